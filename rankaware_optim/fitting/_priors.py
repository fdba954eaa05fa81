"""What is assumed before any trial, by the init of the factors: how best rates move with rank, to
full finetuning, and with the number of steps.

How they move from the steps of the trials to those of a longer target no trial shows, and other
tasks do not tell: rates rise in some and fall in others (benchmarks/results/longer.md). So the
rate stays, and its band grows. Let u = |log2(target / steps)|, and σ the standard deviation of the
slope on other tasks, in octaves of rate per octave of steps. The slope is a stationary Gaussian
process with the correlation exp(−u/λ), so over u octaves the best rate has the variance

    2·σ²·λ²·(u/λ + exp(−u/λ) − 1)

Its standard deviation is σ·u at first, and grows as the root of u beyond λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from .._types import Reference
from ..laws import Law, Power
from ._posterior import Fit, Prior

# Octaves, by init: standard deviation of the law's rate for full finetuning when only LoRA was
# tried. The study found .79 from Init[A], .84 from all ranks at Init[B], from high ones .4 to .6.
# Its mean is 0: full finetuning needs no factor at the width of Survey.full_width (both are frozen
# answers of benchmarks/README.md).
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


# Standard deviation of the slope, octaves of rate per octave of steps: the least of five with which
# bands hold the best rate over eight times the steps on four tasks.
_SLOPE_SD = 0.4


def steps_variance(octaves: float, slope_sd: float = _SLOPE_SD) -> float:
    """Return the variance of log2 of a best rate over octaves of steps, up or down."""
    u = abs(octaves) / _REACH
    return 2.0 * (slope_sd * _REACH) ** 2 * (u + math.expm1(-u))


def at_target(fit: Fit, octaves: float) -> Fit:
    """Return a fit at the target's steps, log2(target / steps) octaves from those of its trials."""
    added = np.diag([steps_variance(octaves), 0.0, 0.0])
    return replace(fit, covariance=fit.covariance + added)
