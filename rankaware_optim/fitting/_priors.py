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
from ._constants import (
    CERTAIN,
    DRIFT,
    FULL_SD,
    SLOPE_LENGTH,
    SLOPE_SD,
    USUAL_PIVOT,
)
from ._posterior import Fit, Prior


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
    pivot = round(math.exp(sum(logs) / len(logs)), 9) if logs else USUAL_PIVOT
    drift_sd = DRIFT[reference.init][1]
    if reference.method == "full":  # the base rate is that of full finetuning
        return Prior(drift_sd, CERTAIN, pivot)
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
    mean = 0.0 if law.falls_with_rank else DRIFT[reference.init][0]
    return Power(
        exponent=mean + drift,
        full_factor=2.0**factor,
        pivot=pivot,
        to_full=reference.init == "B",
        law=law,
    )


def steps_variance(octaves: float, slope_sd: float = SLOPE_SD) -> float:
    """Return the variance of log2 of a best rate over octaves of steps, up or down."""
    u = abs(octaves) / SLOPE_LENGTH
    return 2.0 * (slope_sd * SLOPE_LENGTH) ** 2 * (u + math.expm1(-u))


def at_target(fit: Fit, octaves: float) -> Fit:
    """Return a fit at the target's steps, log2(target / steps) octaves from those of its trials."""
    added = np.diag([steps_variance(octaves), 0.0, 0.0])
    return replace(fit, covariance=fit.covariance + added)
