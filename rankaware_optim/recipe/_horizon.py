"""How the best rate moves with steps and batch size, and how uncertain that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .._checks import is_within, plain, range_of, shown
from .._printing import give_or_take, times
from .._types import Method, Reference
from ..errors import RecipeError
from ..fitting import added_slope

# Prior standard deviations, octaves of rate per octave: of the slope about 0 (small sweeps had -0.1
# under Init[A] and +0.3 in full finetuning), and of the batch exponent about the law's (small
# sweeps had 0.3 to 0.67).
SLOPE_SD = 0.3
BATCH_SD = 0.15


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


@dataclass(frozen=True)
class Horizon:
    """How log2 of the best rate depends on log2 of the number of steps.

    Args:
        slope: octaves of rate per octave of steps.
        slope_sd: its standard deviation.
    """

    slope: float = 0.0
    slope_sd: float = SLOPE_SD

    def by_steps(
        self,
        steps: int | None,
        own: int | None,
        name: str,
        reference: Reference,
        method: Method,
    ) -> Moved:
        """Return the move from a recipe's `own` steps to `steps`.

        For another method than the recipe's, the slope differs as the prior of the fit says.

        Args:
            steps: the number of steps wanted, None for the recipe's own.
            own: the recipe's number of steps, None if unknown.
            name: the recipe's name, for messages.
            reference: the recipe's.
            method: the one asked for, LoRA or full finetuning.

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
        added = added_slope(reference, method)
        slope = self.slope + added.mean
        sd = math.hypot(self.slope_sd, added.sd)
        return _moved(
            steps, own, slope, sd, name, "steps", f"{steps} steps instead of {own}"
        )


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
    return _moved(
        batch,
        own,
        rule,
        BATCH_SD,
        name,
        "batch",
        f"batch {batch:g} instead of {own or 0:g}",
    )


def _moved(
    asked: float,
    own: float | None,
    slope: float,
    sd: float,
    name: str,
    what: str,
    words: str,
) -> Moved:
    if own is None:
        raise RecipeError(
            f"Recipe {name!r} does not give its own {what}, so the rate cannot be moved to"
            f" {asked:g}.",
            f"Leave {what}= out, or calibrate with {what}=.",
        )
    octaves = math.log2(asked / own)
    move, off = times(slope * octaves), give_or_take(abs(sd * octaves))
    why = f"{words}: an extrapolation by {move}, {off}"
    return Moved(slope * octaves, (sd * octaves) ** 2, (why,)) if octaves else Moved()
