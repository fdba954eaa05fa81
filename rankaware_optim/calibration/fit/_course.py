"""How the best rate moves with the number of steps, or with the batch: a slope that is remembered for a few octaves.

With ℓ = log2(steps / target), v(ℓ) = v(target) + h(ℓ). The slope dh/dℓ is a stationary Gaussian process of mean m and
standard deviation σ, and slopes λ octaves apart are correlated by 1/e. So with q(u) = λ·|u| + λ²·(exp(−|u|/λ) − 1)

    E h(a) = m·a,   Cov(h(a), h(b)) = σ²·(q(a) + q(b) − q(a − b))

and a slope seen between two short lengths goes on for λ octaves at most: a straight line through them would end too
high, since the best rate rises with the steps at first and hardly later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slope:
    """A prior of a slope, octaves of rate per octave: its mean and its standard deviation."""

    mean: float = 0.0
    sd: float = 0.3


_UNTOLD = Slope()


@dataclass(frozen=True)
class Course:
    """A prior of h at the values `tried`, beside the one that is meant, `target`.

    reach: λ, octaves. lora: the slope of LoRA. full: what full finetuning's slope has beside that; its h at the values
    tried are unknowns of their own.
    """

    target: float = 1.0
    tried: tuple[float, ...] = ()
    lora: Slope = _UNTOLD
    full: Slope = _UNTOLD
    reach: float = 1.5

    def octaves(self) -> Array:
        """log2 of the values tried over the target."""
        return np.array([math.log2(value / self.target) for value in self.tried])

    def row(self, value: float | None, full: bool) -> Array:
        """How an optimum at `value` follows from this course's unknowns; None is the target."""
        at = np.array([float(value == one) for one in self.tried])
        return np.concatenate([at, at * full])

    def mean(self) -> Array:
        """Of the unknowns: h at every value tried, then what full finetuning's have beside these."""
        return np.concatenate([slope.mean * self.octaves() for slope in (self.lora, self.full)])

    def covariance(self) -> Array:
        """Of the unknowns."""
        at, none = self.octaves(), np.zeros((len(self.tried), len(self.tried)))
        alone = self._moved(at)[:, None] + self._moved(at)[None, :] - self._moved(at[:, None] - at[None, :])
        return np.block([[self.lora.sd**2 * alone, none], [none, self.full.sd**2 * alone]])

    def _moved(self, octaves: Array) -> Array:
        """q: half the variance of what h moves over so many octaves, where σ = 1."""
        u = np.abs(octaves) / self.reach
        return np.asarray(self.reach**2 * (u + np.expm1(-u)))


NOWHERE = Course()  # of a study whose trials all have the target's value
