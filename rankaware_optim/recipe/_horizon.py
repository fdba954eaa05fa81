"""Another number of steps or another batch than a recipe's own: how far its best rate moves, and how surely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._checks import is_within, range_of, shown
from ..errors import RecipeError

SLOPE_SD = 0.3  # prior of the slope about 0: small sweeps had -0.1 under Init[A] and +0.3 in full finetuning
BATCH_SD = 0.15  # octaves of rate per octave of batch about the law's rule: small sweeps had 0.3 to 0.67


class Moved(NamedTuple):
    """Where another length or batch puts the best rate: octaves by which it moves, its further variance, why in words.

    The variance is below 0 where a rate is surer there.
    """

    octaves: float = 0.0
    variance: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Horizon:
    """log2 of the best rate against log2 of the steps: `slope` and its standard deviation, octaves per octave.

    tried: (steps, octaves, variance) of the lengths that trials had, rising, where they are others than the recipe's
    own: how far the best rate lies there from the own one, and by how much its variance is another, octaves². Between
    two lengths it lies on a straight line.
    """

    slope: float = 0.0
    slope_sd: float = SLOPE_SD
    tried: tuple[tuple[int, float, float], ...] = ()

    def by_steps(self, steps: int | None, own: int | None, name: str, told: bool = True) -> Moved:
        """From a recipe's `own` steps to `steps`. told: whether the slope is of what is asked for, LoRA or full.

        Raises RecipeError where `steps` is no positive whole number, or the recipe does not know its own.
        """
        if steps is None:
            return Moved()
        if not isinstance(steps, int) or not is_within("steps", steps):
            raise RecipeError(f"steps is {shown(steps)}.", f"Give {range_of('steps')}.")
        if told and self.tried and own:
            return self._between(steps, own)
        slope, sd = (self.slope, self.slope_sd) if told else (0.0, max(self.slope_sd, SLOPE_SD))
        return _moved(steps, own, slope, sd, name, "steps", f"{steps} steps instead of {own}")

    def _between(self, steps: int, own: int) -> Moved:
        """Along the lengths tried; beyond them by the slope, from the nearest."""
        known = sorted({(own, 0.0, 0.0), *self.tried})
        at, octaves, variances = zip(*((math.log2(n), x, wider) for n, x, wider in known), strict=True)
        x = math.log2(steps)
        inside = min(max(x, at[0]), at[-1])
        moved = float(np.interp(inside, at, octaves)) + self.slope * (x - inside)
        wider = float(np.interp(inside, at, variances)) + (self.slope_sd * (x - inside)) ** 2
        lengths = [n for n, *_ in known]
        why = f"{steps} steps were not tried: an extrapolation from {', '.join(map(str, lengths))}"
        return Moved(moved, wider, () if steps in lengths else (why,))


def by_batch(batch: float | None, own: float | None, rule: float, name: str) -> Moved:
    """From a recipe's `own` batch to `batch`, by `rule` octaves of rate per octave.

    Raises RecipeError where `batch` is no positive number, or the recipe does not know its own.
    """
    if batch is None:
        return Moved()
    if not is_within("batch", batch):
        raise RecipeError(
            f"batch is {shown(batch)}.", f"Give {range_of('batch')}, counted as the recipe counts its own."
        )
    return _moved(batch, own, rule, BATCH_SD, name, "batch", f"batch {batch:g} instead of {own or 0:g}")


def _moved(asked: float, own: float | None, slope: float, sd: float, name: str, what: str, words: str) -> Moved:
    if own is None:
        raise RecipeError(
            f"Recipe {name!r} does not say its own {what}, so nothing says how far {asked:g} is from it.",
            f"Leave {what}= out, or calibrate with {what}=.",
        )
    octaves = math.log2(asked / own)
    why = f"{words}: an extrapolation by {slope:+.2f} ± {sd:.2f} octaves per octave"
    return Moved(slope * octaves, (sd * octaves) ** 2, (why,)) if octaves else Moved()
