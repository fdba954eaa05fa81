"""Compare two recipes: their rates if both have one, then every value that differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from .._checks import is_number
from .._printing import Table
from ..recipe import Recipe, known_rate, to_document

_ABSENT = "not given"
_NOWHERE = "configurations"
# Last names of fields that are compared by a factor: rates, widths, counts. Other numbers are
# compared by a difference.
_BY_FACTOR = {
    *("lr", "fitted_lr", "band_low", "band_high", "ceiling", "full_factor"),
    *("rank", "alpha", "fan_in", "full_fan_in", "batch", "steps", "tokens", "pivot"),
}
_EQUAL = 1e-9  # relative: rates that differ by less are equal up to rounding


@dataclass(frozen=True)
class Difference:
    """One difference between two recipes.

    Args:
        what: the field's path in the file, or a configuration such as "at rank 8".
        first: the first recipe's value as text.
        second: the second recipe's value as text.
        words: the difference in words, "" if there are none.
    """

    what: str
    first: str
    second: str
    words: str = ""


def diff_recipes(first: Recipe, second: Recipe) -> tuple[Difference, ...]:
    """Compare two recipes.

    Args:
        first: the recipe to compare with.
        second: the other recipe.

    Returns:
        The differences, rates at common ranks first, then every field. Empty for equal recipes.
    """
    return (*_rates(first, second), *_fields(first, second))


def diff_text(differences: Sequence[Difference]) -> str:
    """Return the result of `diff_recipes` as a table with a sentence above it, or as one sentence
    if it is empty.
    """
    if not differences:
        return "The two recipes are equal."
    rows = [(d.what, d.first, d.second, d.words) for d in differences]
    headings = ("what", "first", "second", "second against first")
    table = Table(headings, rows, left=headings)
    return f"{_sentence(differences)}\n{table.text(150)}"


def _sentence(differences: Sequence[Difference]) -> str:
    moved = [d for d in differences if d.what.startswith("at ")]
    if any(d.what == _NOWHERE for d in differences):
        return "The recipes have no configuration in common, so their rates were not compared."
    if not moved:
        return "The rates are the same. The fields below differ."
    apart = [
        d.what.removeprefix("at ") for d in moved if d.words.endswith("bands apart")
    ]
    if not apart:
        return "The rates differ. Their 90 % bands overlap at every common rank."
    return f"The rates differ by more than their 90 % bands at {', '.join(apart)}."


# --- rates ----------------------------------------------------------------------------------------


def _rates(first: Recipe, second: Recipe) -> Iterator[Difference]:
    """Yield the rates that differ, at the ranks that either recipe saw and at full finetuning.

    If no configuration has a rate by both, this is a difference too.
    """
    compared = False
    ranks: set[int] = set()
    for recipe in (first, second):
        ranks |= {*recipe.ranks, *filter(None, [recipe.reference.rank])}
    for rank in (*sorted(ranks), None):
        one, two = known_rate(first, rank), known_rate(second, rank)
        if one is None or two is None:
            continue
        compared = True
        if math.isclose(one.lr, two.lr, rel_tol=_EQUAL):
            continue
        overlap = max(one.low, two.low) <= min(one.high, two.high)
        words = f"{_factor(one.lr, two.lr)}, bands {'overlap' if overlap else 'apart'}"
        old, new = (f"{rate.lr:.3g} ({rate.band})" for rate in (one, two))
        yield Difference(
            f"at rank {rank}" if rank else "at full finetuning", old, new, words
        )
    if not compared:
        yield Difference(
            _NOWHERE, str(first.reference), str(second.reference), "none in common"
        )


# --- fields ---------------------------------------------------------------------------------------


def _fields(first: Recipe, second: Recipe) -> Iterator[Difference]:
    """Yield the fields of the TOML file and the tensors that differ, by their paths."""
    one, two = dict(flat(to_document(first))), dict(flat(to_document(second)))
    for path in {**one, **two}:
        old, new = one.get(path), two.get(path)
        if old != new:
            yield Difference(path, _text(old), _text(new), _words(path, old, new))
    arrays, others = first.tensors, second.tensors
    for name in sorted({**arrays, **others}):  # safetensors has no order
        a, b = arrays.get(name), others.get(name)
        path = f"trials.{name}"
        if a is None or b is None or a.shape != b.shape:
            yield Difference(path, _size(a), _size(b))
            continue
        both_nan = (a != a) & (b != b)
        count = int(((a != b) & ~both_nan).sum())
        if count:
            yield Difference(
                path, _size(a), _size(b), f"{count} of {a.size} values differ"
            )


def _words(path: str, old: Any, new: Any) -> str:
    """Return the difference of two numbers, by a factor for rates, widths and counts."""
    if not (is_number(old) and is_number(new)):
        return ""
    if path.rpartition(".")[2] in _BY_FACTOR and old > 0 and new > 0:
        return _factor(old, new)
    return f"{new - old:+.3g}"


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested TOML by dotted path, without those that are None."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)
    elif value is not None:
        yield path, value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return (
        _ABSENT
        if value is None
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def _size(tensor: npt.NDArray[Any] | None) -> str:
    return _ABSENT if tensor is None else " × ".join(map(str, tensor.shape)) or "1"


def _factor(old: float, new: float) -> str:
    return f"× {new / old:.3g}"
