"""What is assumed before any trial, by the init of the factors: how best rates move with rank, to
full finetuning, and with the number of steps.

How they move from the steps of the trials to those of a longer target run no trial shows. Let
u = log2(target / steps), and m, σ the mean and standard deviation of the slope on other tasks, in
octaves of rate per octave of steps. The slope is a stationary Gaussian process with the correlation
exp(−|u|/λ), so over u octaves

    the best rate moves by m·u, with variance 2·σ²·λ²·(u/λ + exp(−u/λ) − 1)

Its standard deviation is σ·u at first, and grows as the root of u beyond λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .._types import Reference
from ..laws import Law, Power
from ._posterior import Fit, Prior

# Octaves, by init: standard deviation of the law's rate for full finetuning when only LoRA was
# tried. The study found .79 from Init[A] (results/a_to_full.md), .84 from all ranks at Init[B]
# (results/init_b_forms.md), from high ones .4 to .6. Its mean is 0: full finetuning needs no factor
# at the width of Survey.full_width (results/full_width.md).
FULL_SD = {"A": 0.8, "B": 0.6}
# Octaves per octave of rank, by init: mean and standard deviation of the drift. Small studies found
# that rates at Init[B] fall with rank by 0.3 to 0.75.
_DRIFT = {"A": (0.0, 0.15), "B": (-0.45, 0.2)}
_CERTAIN = 1e-3  # octaves: a negligible standard deviation
_USUAL_PIVOT = 16.0  # of trials of full finetuning alone
_REACH = 1.5  # λ, octaves


def prior_of(
    reference: Reference, ranks: Iterable[int | None], full_fan_in: float | None
) -> Prior:
    """Return the prior of a fit.

    Args:
        reference: the configuration of the base rate.
        ranks: those of the trials, None for full finetuning.
        full_fan_in: the width on which the rate of full finetuning depends.
    """
    logs = [math.log(rank) for rank in ranks if rank is not None]
    pivot = round(math.exp(sum(logs) / len(logs)), 9) if logs else _USUAL_PIVOT
    drift_sd = _DRIFT[reference.init][1]
    if reference.method == "full":  # the base rate is that of full finetuning
        return Prior(drift_sd, _CERTAIN, pivot)
    to_full = (full_fan_in or pivot) if reference.init == "B" else pivot
    return Prior(drift_sd, FULL_SD[reference.init], pivot, math.log2(to_full / pivot))


def centred_law(
    law: Law,
    reference: Reference,
    pivot: float,
    drift: float = 0.0,
    factor: float = 0.0,
) -> Power:
    """Return a law at the prior means, plus a fitted drift and log2 of a full-finetuning factor.

    Args:
        law: the law, bound to the optimizer.
        reference: the configuration of the base rate. At full finetuning nothing is added.
        pivot: the rank at which the base rate is defined.
        drift: octaves per octave of rank.
        factor: octaves.
    """
    if reference.method == "full":
        return Power(law=law)
    mean = 0.0 if law.falls_with_rank else _DRIFT[reference.init][0]
    return Power(
        exponent=mean + drift,
        full_factor=2.0**factor,
        pivot=pivot,
        to_full=reference.init == "B",
        law=law,
    )


@dataclass(frozen=True)
class Slope:
    """The prior of a slope: mean and standard deviation, octaves of rate per octave of steps."""

    mean: float
    sd: float


# Slopes of LoRA, and what full finetuning's are more. Measured from a quarter to all of the study's
# steps on four tasks: Init[A] 0.0 ± 0.2, Init[B] 0.2 ± 0.3, full 0.25 ± 0.2. On a transformer from
# 25 to 400 steps: Init[A] 0.5 falling to -0.2, Init[B] 0.4 and full 0.5 in the mean, with smaller
# slopes at more steps.
_SLOPES = {
    "A": (Slope(0.0, 0.25), Slope(0.25, 0.2)),
    "B": (Slope(0.15, 0.25), Slope(0.15, 0.2)),
    "full": (Slope(0.3, 0.25), Slope(0.0, 1e-3)),
}


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
        """Return the octaves that the best rate moves by a slope, and their variance."""
        u = self.octaves / _REACH
        return slope.mean * self.octaves, 2.0 * (slope.sd * _REACH) ** 2 * (
            u + math.expm1(-u)
        )

    def prior_of_trials(self, prior: Prior) -> Prior:
        """Return the prior at the steps of the trials. The law's full factor holds at those of the
        target.
        """
        octaves, variance = self.of(self.full)
        full_sd = math.hypot(prior.full_sd, math.sqrt(variance))
        return replace(prior, full_mean=-octaves, full_sd=full_sd)

    def to_target(self, fit: Fit, prior: Prior) -> Fit:
        """Return a fit of the trials, moved to the target. prior: that of the target.

        The full factor that was fitted is the target's minus the move. Both are uncertain, so each
        takes its share.
        """
        octaves, variance = self.of(self.lora)
        full_octaves, full_variance = self.of(self.full)
        share = prior.full_sd**2 / (prior.full_sd**2 + full_variance)
        base, drift, factor = fit.mean
        scale = np.array([1.0, 1.0, share])
        added = np.diag([variance, 0.0, share * full_variance])
        return replace(
            fit,
            prior=prior,
            mean=np.array([base + octaves, drift, share * (factor + full_octaves)]),
            covariance=fit.covariance * np.outer(scale, scale) + added,
            ceiling=None if fit.ceiling is None else fit.ceiling + octaves,
        )


def added_slope(reference: Reference, method: str) -> Slope:
    """Return how much steeper the slope of a method is than the reference's, at its init."""
    if method == reference.method:
        return Slope(0.0, 0.0)
    _, full = _SLOPES[reference.init]
    return full if method == "full" else Slope(-full.mean, full.sd)


def carry_of(reference: Reference, octaves: float) -> Carry:
    """Return the move of a fit over log2(target / steps) octaves."""
    lora, full = _SLOPES["full" if reference.method == "full" else reference.init]
    return Carry(octaves, lora, full)
