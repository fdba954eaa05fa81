"""How sure a recipe is of a rate: the fit's own doubt, and more for every octave beyond what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .._types import Reference

if TYPE_CHECKING:
    from ._recipe import Recipe

__all__ = ["INIT_DOUBT", "RANK_DOUBT", "WIDTH_DOUBT", "Z90", "spread"]

Doubt = tuple[float, str]  # octaves, and what was not seen
Z90 = 1.645
# What the band grows by where the data do not reach, octaves of rate per octave of rank or of width (rules of thumb
# after the spread of published sweeps around the law).
RANK_DOUBT = 0.1
WIDTH_DOUBT = 0.25
INIT_DOUBT = 1.0  # octaves, whole: from one init to the other
# The share of an Init[A] drift, continued to r = n, that full finetuning's band is widened by.
_DRIFT_DOUBT = 0.5


def spread(recipe: Recipe, target: Reference) -> tuple[float, list[str]]:
    """Standard deviation of log2 of the best rate at `target`, octaves, and in words what was not seen."""
    doubts = [*(_full if target.method == "full" else _rank)(recipe, target), *_elsewhere(recipe, target)]
    x = _row(recipe, target)
    variance = float(x @ recipe.covariance.double() @ x)
    return math.sqrt(variance + sum(octaves**2 for octaves, _ in doubts)), [words for _, words in doubts]


def _row(recipe: Recipe, target: Reference) -> torch.Tensor:
    """How log2 of the rate at `target` hangs on what the covariance is of: base, drift, factor of full finetuning."""
    full, pivot = target.method == "full", recipe.law.pivot
    octaves = math.log2(((target.fan_in if full else target.rank) or pivot) / pivot)
    goes_on = recipe.law.to_full or not full
    return torch.tensor([1.0, octaves if goes_on else 0.0, float(full)], dtype=torch.float64)


def _full(recipe: Recipe, target: Reference) -> Iterator[Doubt]:
    if recipe.full_seen:
        return
    octaves = 0.0 if recipe.law.to_full else math.log2((target.fan_in or recipe.law.pivot) / recipe.law.pivot)
    words = "full finetuning was not tried: the rate is the law's, times its prior factor"
    yield _DRIFT_DOUBT * recipe.law.exponent * octaves, words


def _rank(recipe: Recipe, target: Reference) -> Iterator[Doubt]:
    rank = float(target.rank or recipe.law.pivot)
    beyond = _beyond(recipe.ranks, rank)
    if beyond:
        seen = ", ".join(map(str, recipe.ranks))
        yield RANK_DOUBT * beyond, f"rank {rank:g} lies outside the ranks seen ({seen})"


def _elsewhere(recipe: Recipe, target: Reference) -> Iterator[Doubt]:
    """Another width or init than the recipe's own."""
    own = recipe.full_fan_in if target.method == "full" else recipe.reference.fan_in
    if target.fan_in and own and not math.isclose(target.fan_in, own, rel_tol=0.01):
        octaves = math.log2(target.fan_in / own)
        yield WIDTH_DOUBT * octaves, f"fan-in {target.fan_in:g} is not the recipe's own {own:g}"
    if target.init != recipe.reference.init:
        yield INIT_DOUBT, f"Init[{target.init}] was not tried: the law carries the rate across inits"


def _beyond(ranks: Sequence[int], rank: float) -> float:
    """Octaves between `rank` and the nearest end of the ranks seen; 0 inside."""
    return max(0.0, math.log2(min(ranks) / rank), math.log2(rank / max(ranks))) if ranks else 1.0
