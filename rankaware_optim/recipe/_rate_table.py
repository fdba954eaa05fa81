"""A recipe's rates on a grid of ranks and multipliers, as plain numbers: what a page without Python looks rates up in.

Every rank up to 64 is a node, and above there are 32 an octave, few enough to store and near enough for a straight line
between two; along the multiplier a cubic through the four nearest nodes does. Both are in log2, and give three digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import RankAwareError
from ..laws import Measured
from ._recipe import Rate, Recipe, known_rate

__all__ = ["rate_table"]

_EVERY_RANK, _MOST, _PER_OCTAVE = 64, 8192, 32
_SCALINGS = [e / 2 for e in range(-28, 21)]  # log2 of s = alpha / rank
_NO_RULE = "This recipe saw no rule by which alpha follows the rank: give alpha."
_AS_SWEPT = "The sweep behind this recipe did not say its alpha, so its rates hold for alpha as it was swept."
_MEASURED = "This recipe's law is measured, at seconds a rate: for an alpha of your own use recipe.at in Python."


def rate_table(recipe: Recipe) -> dict[str, Any]:
    """What a page needs to give `recipe.at` by rank, alpha and method, as values of JSON.

    ranks, scalings: the nodes, scalings as log2 of s. own: log2 of the rate where alpha is left out, by rank. lr: the
    same by rank and scaling, empty where `refused` says why no alpha can be given. low, high, ceiling: log2 of their
    ratio to the rate, by rank. outside: whether the rank is extrapolated to. notes: by rank, the number of its list in
    `sentences`, in which "{rank}" stands for the rank. full: full finetuning's numbers, or the reason for none.
    """
    refused = _AS_SWEPT if recipe.scaling_rule == "as swept" else _MEASURED if _is_measured(recipe) else ""
    ranks = _ranks(recipe, coarse=_is_measured(recipe))
    own = [known_rate(recipe, rank) for rank in ranks]
    rates = own if refused else [rate or known_rate(recipe, r, alpha=r) for r, rate in zip(ranks, own, strict=True)]
    sentences: list[list[str]] = []
    return {
        "ranks": ranks,
        "scalings": _SCALINGS,
        "own": [_log(None if rate is None else rate.lr) for rate in own],
        "lr": [] if refused else [_row(recipe, rank) for rank in ranks],
        **_ratios(rates),
        "outside": [rate is not None and rate.extrapolated for rate in rates],
        "notes": [_numbered(rate, rank, sentences) for rank, rate in zip(ranks, rates, strict=True)],
        "sentences": sentences,
        "refused": refused,
        "no_rule": _NO_RULE,
        "full": _full(recipe),
    }


def _is_measured(recipe: Recipe) -> bool:
    return isinstance(recipe.law.law, Measured)


def _ranks(recipe: Recipe, coarse: bool) -> list[int]:
    """The nodes, with the ranks seen, where `outside` begins, and those at the width, where some laws have a kink."""
    powers = round(math.log2(_MOST))
    if coarse:
        nodes = {2**e for e in range(powers + 1)}
    else:
        nodes = {*range(1, _EVERY_RANK + 1), *(round(2 ** (e / _PER_OCTAVE)) for e in range(powers * _PER_OCTAVE + 1))}
    width = recipe.reference.fan_in or 1.0
    kinks = () if coarse else (math.floor(width), math.ceil(width))
    own = recipe.reference.rank
    return sorted(rank for rank in {*nodes, *recipe.ranks, own, *kinks} if rank and rank <= _MOST)


def _row(recipe: Recipe, rank: int) -> list[float | None]:
    rates = (known_rate(recipe, rank, alpha=rank * 2.0**s) for s in _SCALINGS)
    return [_log(None if rate is None else rate.lr) for rate in rates]


def _ratios(rates: Sequence[Rate | None]) -> dict[str, list[float | None]]:
    """low, high and ceiling as log2 of their ratio to the rate; None where there is none."""

    def of(rate: Rate | None, name: str) -> float | None:
        edge = None if rate is None else getattr(rate, name)
        return None if rate is None or edge is None else _log(edge / rate.lr)

    return {name: [of(rate, name) for rate in rates] for name in ("low", "high", "ceiling")}


def _log(value: float | None) -> float | None:
    return None if value is None else round(math.log2(value), 4)


def _numbered(rate: Rate | None, rank: int, sentences: list[list[str]]) -> int:
    """The number of the rate's notes in `sentences`, to which they are added where they are new."""
    notes = [] if rate is None else [note.replace(f"rank {rank} ", "rank {rank} ") for note in rate.notes]
    if notes not in sentences:
        sentences.append(notes)
    return sentences.index(notes)


def _full(recipe: Recipe) -> dict[str, Any]:
    rate = known_rate(recipe, None)
    if rate is None:
        return {"error": _why(recipe)}
    ratios = {name: values[0] for name, values in _ratios([rate]).items()}
    return {"lr": _log(rate.lr), **ratios, "outside": rate.extrapolated, "notes": list(rate.notes)}


def _why(recipe: Recipe) -> str:
    try:
        recipe.at(method="full")
    except RankAwareError as error:
        return str(error)
    return ""
