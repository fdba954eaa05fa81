"""The uncertainty of a recipe's rate: the fit's standard deviation, and more for each octave beyond
the trials, also of steps and of batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .._checks import is_within, plain, range_of, shown
from .._printing import give_or_take, times
from .._types import Reference, init_text
from ..errors import RecipeError
from ..fitting import FULL_SD, steps_variance
from ..laws import beyond_batches, checked_batch_multiplier
from ._constants import (
    BATCH_SD,
    DRIFT_SHARE,
    INIT_SD,
    LOWER_RANK_SD,
    MOST_MARGIN,
    RANK_SD,
    WIDTH_SD,
    Z90,
)

if TYPE_CHECKING:
    from ._recipe import Recipe


def own_band(recipe: Recipe) -> tuple[float, float]:
    """Return the ends of the 90 % band of the best rate at the recipe's reference."""
    octaves = Z90 * spread(recipe, recipe.reference)[0]
    return recipe.fitted_lr / 2.0**octaves, recipe.fitted_lr * 2.0**octaves


def margin(steepness: float, sd: float) -> float:
    """Return the margin below the best rate, octaves: a·sd²/2, at most 1/4.

    This margin minimizes the expected loss if the loss above the optimum rises as exp(a·u), u in
    octaves.

    Args:
        steepness: a, per octave.
        sd: standard deviation of the best rate, octaves.
    """
    return min(steepness * sd * sd / 2, MOST_MARGIN)


def spread(recipe: Recipe, target: Reference) -> tuple[float, list[str]]:
    """Return the standard deviation of log2 of the best rate at `target`, octaves, and notes on
    what was not tried.
    """
    full, pivot = target.method == "full", recipe.law.pivot
    octaves = math.log2(((target.fan_in if full else target.rank) or pivot) / pivot)
    # Design vector: gradient of the log2 rate with respect to (base, drift, full factor).
    x = np.array([1.0, octaves if recipe.law.to_full or not full else 0.0, float(full)])
    variance = max(0.0, float(x @ recipe.covariance @ x))
    unseen = list(_unseen(recipe, target))
    # full finetuning has its own factor, so no scatter about the law
    scatter = 0.0 if full else recipe.scatter
    variance += scatter**2 + sum(sd**2 for sd, _ in unseen)
    return math.sqrt(variance), [words for _, words in unseen]


def _unseen(recipe: Recipe, target: Reference) -> Iterator[tuple[float, str]]:
    """Yield what was not tried, with the standard deviation that it adds, octaves."""
    if target.method == "full":
        width = recipe.full_fan_in
        if not recipe.full_seen:
            yield _law_alone(recipe, target)
    else:
        width = recipe.reference.fan_in
        rank = float(target.rank or recipe.law.pivot)
        yield from _other_rank(recipe, rank)
    if target.fan_in and width and not math.isclose(target.fan_in, width, rel_tol=0.01):
        here, own = round(target.fan_in, 1), round(width, 1)
        words = f"fan-in {here:g} is not the recipe's own {own:g}"
        yield WIDTH_SD * math.log2(target.fan_in / width), words
    if target.init != recipe.reference.init:
        words = (
            f"{init_text(target.init)} was not tried: the law moves the rate from the other"
            " init"
        )
        yield INIT_SD, words


def _other_rank(recipe: Recipe, rank: float) -> Iterator[tuple[float, str]]:
    """Yield what is added for a rank beyond those tried, and the note on it."""
    tried = recipe.ranks
    below = math.log2(min(tried) / rank) if tried else 0.0
    above = math.log2(rank / max(tried)) if tried else 1.0
    if max(below, above) <= 0:
        return
    listed = ", ".join(map(str, tried))
    words = f"rank {rank:g} is outside the ranks tried ({listed})"
    if below > 0 and recipe.reference.init == "B":
        words += f": with {init_text('B')} the rate tends to be too high"
        yield LOWER_RANK_SD * below, words
    else:
        yield RANK_SD * max(below, above), words


def _law_alone(recipe: Recipe, target: Reference) -> tuple[float, str]:
    """Return what is added for full finetuning that was not tried, and the note on it."""
    law, init = recipe.law, recipe.reference.init
    octaves = (
        0.0 if law.to_full else math.log2((target.fan_in or law.pivot) / law.pivot)
    )
    return DRIFT_SHARE * law.exponent * octaves, (
        f"full finetuning was not tried: the rate is the law's, from LoRA at {init_text(init)}"
        f" alone. Over the tasks of a study it was off by a factor of {2.0 ** FULL_SD[init]:.2g}"
        " (one standard deviation)"
    )


# --- another number of steps or another batch -----------------------------------------------------


class Moved(NamedTuple):
    """How the best rate moves for another number of steps or another batch.

    octaves: change of log2 of the rate. variance: what is added to its variance, octaves². note:
    the reason in words.
    """

    octaves: float = 0.0
    variance: float = 0.0
    note: str = ""


def by_steps(recipe: Recipe, steps: int | None) -> Moved:
    """Return what another number of steps does: the rate stays, and its band grows as that of a fit
    does. None stands for the recipe's own.

    Raises:
        RecipeError: `steps` is not a positive whole number, or the recipe does not know its own.
    """
    octaves = _octaves(recipe, "steps", steps, recipe.steps)
    if not octaves:
        return Moved()
    variance = steps_variance(octaves)
    why = f"{steps} steps instead of {recipe.steps}: an extrapolation"
    return Moved(0.0, variance, f"{why}, {give_or_take(math.sqrt(variance))}")


def by_batch(recipe: Recipe, batch: float | None) -> Moved:
    """Return what another batch does: the rate moves by the law's rule as far as that was tried,
    and its band grows with the distance. None stands for the recipe's own.

    Raises:
        RecipeError: `batch` is not a positive number, or the recipe does not know its own.
    """
    octaves = _octaves(recipe, "batch", batch, recipe.batch)
    if not octaves:
        return Moved()
    ratio = 2.0**octaves
    move = math.log2(checked_batch_multiplier(recipe.law, ratio))
    sd = BATCH_SD * abs(octaves)
    why = f"batch {batch:g} instead of {recipe.batch:g}: an extrapolation"
    beyond = beyond_batches(ratio) if move else ""
    how = f"by {times(move)}{beyond}, {give_or_take(sd)}"
    return Moved(move, sd**2, f"{why} {how}")


def _octaves(
    recipe: Recipe, what: str, asked: float | None, own: float | None
) -> float:
    """Return log2 of the change of the steps or of the batch from the recipe's own."""
    if asked is None:
        return 0.0
    asked = plain(asked)
    if not is_within(what, asked):
        raise RecipeError(f"{what} is {shown(asked)}.", f"Give {range_of(what)}.", what)
    if own is None:
        raise RecipeError(
            f"Recipe {recipe.name!r} does not give its own {what}, so the rate cannot be moved to"
            f" {asked:g}.",
            f"Leave {what}= out, or calibrate with {what}=.",
        )
    return math.log2(asked / own)
