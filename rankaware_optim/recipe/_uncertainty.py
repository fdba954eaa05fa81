"""How sure a recipe is of a rate: the fit's own standard deviation, and more for every octave beyond what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .._types import Reference

if TYPE_CHECKING:
    from ._recipe import Recipe

Z90 = 1.645
# Standard deviations that the band grows by where the data do not reach, octaves of rate per octave of rank or of width
# (rules of thumb after the spread of published sweeps around the law).
RANK_SD = 0.1
WIDTH_SD = 0.25
INIT_SD = 1.0  # octaves, whole: from one init to the other
# Octaves, whole: of the law's point for full finetuning from LoRA rates alone, by their init. The study found .79 from
# Init[A] (results/a_to_full.md), .84 from all ranks at Init[B] (results/init_b_forms.md), from high ones .4 to .6.
FULL_SD = {"A": 0.8, "B": 0.6}
# The share of an Init[A] drift, continued to r = n, that full finetuning's band is widened by.
_DRIFT_SHARE = 0.5
# Octaves: a larger margin lost more than it saved (benchmarks/calibration/simulated.py --surfaces other).
MOST_MARGIN = 0.25


def own_band(recipe: Recipe) -> tuple[float, float]:
    """Low and high of the 90 % band of the best rate at the recipe's reference."""
    octaves = Z90 * spread(recipe, recipe.reference)[0]
    return recipe.fitted_lr / 2.0**octaves, recipe.fitted_lr * 2.0**octaves


def margin(steepness: float, sd: float) -> float:
    """Octaves by which a rate is quoted below a best one that is known to `sd` octaves: a·sd²/2, a quarter at most.

    That is the best under a cliff of steepness a (per octave), where the loss above the optimum rises as exp(a·u).
    """
    return min(steepness * sd * sd / 2, MOST_MARGIN)


def with_margin(recipe: Recipe) -> Recipe:
    """The recipe, its own rate less the margin that its uncertainty there asks for."""
    return replace(recipe, lean=margin(recipe.steepness, spread(recipe, recipe.reference)[0]))


def spread(recipe: Recipe, target: Reference) -> tuple[float, list[str]]:
    """Standard deviation of log2 of the best rate at `target`, octaves, and in words what was not seen."""
    full, pivot = target.method == "full", recipe.law.pivot
    octaves = math.log2(((target.fan_in if full else target.rank) or pivot) / pivot)
    # How log2 of the rate moves with what the covariance is of: base, drift, factor of full finetuning.
    x = np.array([1.0, octaves if recipe.law.to_full or not full else 0.0, float(full)])
    variance = max(0.0, float(x @ recipe.covariance @ x))
    unseen = list(_unseen(recipe, target))
    own = 0.0 if full else recipe.scatter  # in full finetuning the factor is its own
    return math.sqrt(variance + own**2 + sum(sd**2 for sd, _ in unseen)), [words for _, words in unseen]


def _unseen(recipe: Recipe, target: Reference) -> Iterator[tuple[float, str]]:
    """What was not tried, each with the standard deviation that it adds, octaves."""
    law, full = recipe.law, target.method == "full"
    if full and not recipe.full_seen:
        octaves = 0.0 if law.to_full else math.log2((target.fan_in or law.pivot) / law.pivot)
        init = recipe.reference.init
        words = (
            f"full finetuning was not tried: the rate is the law's, from LoRA at Init[{init}] alone, whose standard "
            f"deviation was {FULL_SD[init]:g} octaves over the tasks of a study"
        )
        yield _DRIFT_SHARE * law.exponent * octaves, words
    if not full:
        rank, ranks = float(target.rank or law.pivot), recipe.ranks
        beyond = max(0.0, math.log2(min(ranks) / rank), math.log2(rank / max(ranks))) if ranks else 1.0
        if beyond:
            seen = ", ".join(map(str, ranks))
            yield RANK_SD * beyond, f"rank {rank:g} lies outside the ranks seen ({seen})"
    own = recipe.full_fan_in if full else recipe.reference.fan_in
    if target.fan_in and own and not math.isclose(target.fan_in, own, rel_tol=0.01):
        yield WIDTH_SD * math.log2(target.fan_in / own), f"fan-in {target.fan_in:g} is not the recipe's own {own:g}"
    if target.init != recipe.reference.init:
        yield INIT_SD, f"Init[{target.init}] was not tried: the law carries the rate across inits"
