"""How the best rate moves with steps and batch size, and how uncertain that is."""

from __future__ import annotations

import math
from typing import NamedTuple

from .._checks import is_within, plain, range_of, shown
from .._printing import give_or_take, times
from ..errors import RecipeError
from ..fitting import steps_variance
from ._constants import BATCH_SD


class Moved(NamedTuple):
    """How the best rate moves for another number of steps or another batch.

    Args:
        octaves: change of log2 of the rate.
        variance: what is added to its variance, octaves².
        notes: the reason in words.
    """

    octaves: float = 0.0
    variance: float = 0.0
    notes: tuple[str, ...] = ()


def by_steps(steps: int | None, own: int | None, name: str) -> Moved:
    """Return what a recipe's rate does from its `own` steps to `steps`: it stays, and its band
    grows as that of a fit does.

    Args:
        steps: the number of steps wanted, None for the recipe's own.
        own: the recipe's number of steps, None if unknown.
        name: the recipe's name, for messages.

    Raises:
        RecipeError: `steps` is not a positive whole number, or `own` is None.
    """
    if steps is None:
        return Moved()
    steps = plain(steps)
    if not isinstance(steps, int) or not is_within("steps", steps):
        raise RecipeError(
            f"steps is {shown(steps)}.", f"Give {range_of('steps')}.", "steps"
        )
    octaves = _octaves(steps, own, name, "steps")
    variance = steps_variance(octaves)
    why = f"{steps} steps instead of {own}: an extrapolation, {_off(variance)}"
    return Moved(0.0, variance, (why,)) if octaves else Moved()


def by_batch(batch: float | None, own: float | None, rule: float, name: str) -> Moved:
    """Return the move from a recipe's `own` batch to `batch`, by `rule` octaves of rate per octave
    of batch.

    Raises:
        RecipeError: `batch` is not a positive number, or `own` is None.
    """
    if batch is None:
        return Moved()
    batch = plain(batch)
    if not is_within("batch", batch):
        raise RecipeError(
            f"batch is {shown(batch)}.",
            f"Give {range_of('batch')}, in the unit of the recipe's own batch.",
            "batch",
        )
    octaves = _octaves(batch, own, name, "batch")
    move, variance = rule * octaves, (BATCH_SD * octaves) ** 2
    why = (
        f"batch {batch:g} instead of {own:g}: an extrapolation by {times(move)},"
        f" {_off(variance)}"
    )
    return Moved(move, variance, (why,)) if octaves else Moved()


def _octaves(asked: float, own: float | None, name: str, what: str) -> float:
    """Return log2 of the change of the steps or of the batch."""
    if own is None:
        raise RecipeError(
            f"Recipe {name!r} does not give its own {what}, so the rate cannot be moved to"
            f" {asked:g}.",
            f"Leave {what}= out, or calibrate with {what}=.",
        )
    return math.log2(asked / own)


def _off(variance: float) -> str:
    return give_or_take(math.sqrt(variance))
