"""How best rates move from the steps of the trials to those of a longer target run, which no trial
shows.

Let u = log2(target / steps), and m, σ the mean and standard deviation of the slope on other tasks,
in octaves of rate per octave of steps. The slope is a stationary Gaussian process with the
correlation exp(−|u|/λ), so over u octaves

    the best rate moves by m·u, with variance 2·σ²·λ²·(u/λ + exp(−u/λ) − 1)

Its standard deviation is σ·u at first, and grows as the root of u beyond λ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ._posterior import Fit, Prior

_REACH = 1.5  # λ, octaves


@dataclass(frozen=True)
class Slope:
    """The prior of a slope: mean and standard deviation, octaves of rate per octave of steps."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Carry:
    """The move of a fit from the steps of the trials to those of the target.

    Args:
        octaves: log2(target / steps), at least 0.
        lora: the slope of LoRA.
        full: the difference of full finetuning's slope.
    """

    octaves: float
    lora: Slope
    full: Slope

    def of(self, slope: Slope) -> tuple[float, float]:
        """Return how far log2 of the best rate moves by a slope, octaves, and the variance of that."""
        u = self.octaves / _REACH
        return slope.mean * self.octaves, 2.0 * (slope.sd * _REACH) ** 2 * (u + math.expm1(-u))

    def prior_of_trials(self, prior: Prior) -> Prior:
        """Return the prior at the steps of the trials. The law's full factor holds at those of the
        target.
        """
        octaves, variance = self.of(self.full)
        return replace(
            prior, full_mean=-octaves, full_sd=math.hypot(prior.full_sd, math.sqrt(variance))
        )

    def to_target(self, fit: Fit, prior: Prior) -> Fit:
        """Return a fit of the trials, moved to the target. prior: that of the target.

        The full factor that was fitted is the target's minus the move. Both are uncertain, so each
        takes its share.
        """
        (octaves, variance), (more, of_more) = self.of(self.lora), self.of(self.full)
        share = prior.full_sd**2 / (prior.full_sd**2 + of_more)
        base, drift, factor = fit.mean
        scale = np.array([1.0, 1.0, share])
        return replace(
            fit,
            mean=np.array([base + octaves, drift, share * (factor + more)]),
            covariance=fit.covariance * np.outer(scale, scale)
            + np.diag([variance, 0.0, share * of_more]),
            ceiling=None if fit.ceiling is None else fit.ceiling + octaves,
        )
