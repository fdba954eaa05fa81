"""Compare two recipes: their rates at the ranks of either, and the fields that differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .._printing import Table
from .._rate import Rate
from ..recipe import Recipe, differing, known_rate


@dataclass(frozen=True)
class Differences:
    """What two recipes do not share.

    Args:
        rates: configurations such as "rank 8" at which both have a rate, and the two rates.
        fields: the names of the recipe's fields that differ.
    """

    rates: Mapping[str, tuple[Rate, Rate]]
    fields: tuple[str, ...]

    def __str__(self) -> str:
        if not self.fields:
            return "The two recipes are equal."
        said = "They have no configuration in common."
        if self.rates:
            headings = ("at", "first", "second", "second / first", "90 % bands")
            rows = [_row(at, *pair) for at, pair in self.rates.items()]
            said = Table(headings, rows, left=["at"]).text(100)
        return f"{said}\nFields that differ: {', '.join(self.fields)}."


def diff_recipes(first: Recipe, second: Recipe) -> Differences:
    """Compare two recipes: their rates at the ranks of either and in full finetuning, and every
    field.
    """
    ranks = {first.reference.rank, second.reference.rank, *first.ranks, *second.ranks}
    rates = {}
    for rank in (*sorted(filter(None, ranks)), None):
        one, two = known_rate(first, rank), known_rate(second, rank)
        if one is None or two is None:
            continue
        rates[f"rank {rank}" if rank else "full finetuning"] = (one, two)
    return Differences(rates, tuple(sorted(differing(first, second))))


def _row(at: str, one: Rate, two: Rate) -> tuple[str, ...]:
    bands = "apart"
    if max(one.low, two.low) <= min(one.high, two.high):
        bands = "overlap"
    return at, f"{one.lr:.3g}", f"{two.lr:.3g}", f"{two.lr / one.lr:.3g}", bands
