"""Prior of how the best rate moves with the number of steps or with the batch: a slope correlated over a few octaves.

Let ℓ = log2(steps / target) and v(ℓ) = v(target) + h(ℓ). The slope dh/dℓ is a stationary Gaussian process with mean m,
standard deviation σ and correlation exp(−|u|/λ) at a distance of u octaves. With q(u) = λ·|u| + λ²·(exp(−|u|/λ) − 1),

    E h(a) = m·a,   Cov(h(a), h(b)) = σ²·(q(a) + q(b) − q(a − b))

A slope measured between two short lengths is therefore extrapolated over about λ octaves. A straight line through them
would end too high, since the best rate rises with the steps at first and hardly later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slope:
    """The prior of a slope: mean and standard deviation, octaves of rate per octave."""

    mean: float = 0.0
    sd: float = 0.3


_DEFAULT_SLOPE = Slope()


@dataclass(frozen=True)
class Trend:
    """The prior of h at the values `tried`.

    Args:
        target: the number of steps, or the batch, of the target run.
        tried: the values of the trials.
        lora: the slope of LoRA.
        full: the difference of full finetuning's slope. It adds one unknown for each value tried.
        reach: λ, octaves.
    """

    target: float = 1.0
    tried: tuple[float, ...] = ()
    lora: Slope = _DEFAULT_SLOPE
    full: Slope = _DEFAULT_SLOPE
    reach: float = 1.5

    def octaves(self) -> Array:
        """log2 of the values tried over the target, shape (tried,)."""
        return np.array([math.log2(value / self.target) for value in self.tried])

    def row(self, value: float | None, full: bool) -> Array:
        """Return the gradient of an optimum at `value` with respect to the unknowns. value: None for the target."""
        at = np.array([float(value == one) for one in self.tried])
        return np.concatenate([at, at * full])

    def mean(self) -> Array:
        """Return the prior mean of the unknowns: h at every value tried, then the differences of full finetuning."""
        return np.concatenate([slope.mean * self.octaves() for slope in (self.lora, self.full)])

    def covariance(self) -> Array:
        """Return the prior covariance of the unknowns."""
        at, none = self.octaves(), np.zeros((len(self.tried), len(self.tried)))
        alone = self._moved(at)[:, None] + self._moved(at)[None, :] - self._moved(at[:, None] - at[None, :])
        return np.block([[self.lora.sd**2 * alone, none], [none, self.full.sd**2 * alone]])

    def _moved(self, octaves: Array) -> Array:
        """Return q: half the variance of h's change over so many octaves, for σ = 1."""
        u = np.abs(octaves) / self.reach
        return np.asarray(self.reach**2 * (u + np.expm1(-u)))


NO_TREND = Trend()  # for a study whose trials all have the target's value
