"""This module estimates from the trials how the best learning rate depends on the rank.

The fit estimates three values and their covariance: the base learning rate, the drift with rank,
and the factor for full finetuning. The fit has two steps. The first step (`bowls_of`) estimates the
optimum v of each rank for every shape of the loss curve and every noise level. The second step is a
linear regression that combines the optima of all ranks, for each shape:

    v(r) = base + drift·log2(r / pivot)
    v(full) = base + drift·full_reach + factor

The drift with rank and the factor for full finetuning are deviations from a scaling law, so the
mean of their prior is zero. Before the fit, the scaling law (`centred_law`) converts the learning
rate of each trial to the reference configuration. The converted learning rates therefore only
contain the deviations from the scaling law. The posterior is a mixture of one normal distribution
per shape. A shape has a high weight if it explains the losses well, and if its optima agree with
the equations above.

The final run often has more steps than the trials. The trials all have the same number of steps, so
they do not show how the best learning rate changes with the number of steps. With more steps, the
best learning rate increases on some tasks and decreases on others (longer.md,
benchmarks/answers.md). For a final run with more steps, the fit therefore does not change the
learning rate and only makes its 90 % interval wider. Let u be |log2(target / steps)|, where steps
is the length of a trial and target the length of the final run. The slope is the change of the best
learning rate in octaves per octave of steps, and σ is the standard deviation of the slope over
several tasks. The slope is modelled as a stationary Gaussian process in log2(steps) with the
correlation exp(−u/λ). The total change is the integral of the slope, so its variance over u octaves
is

    2·σ²·λ²·(u/λ + exp(−u/λ) − 1)

For small u, the standard deviation of the total change is about σ·u. If u is larger than λ, the
standard deviation of the change grows with the square root of u.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .._types import Reference
from ..laws import Falling, Law, Power, layers_of
from ._constants import (
    BASE_SD,
    CERTAIN,
    DRIFT,
    FULL_SD,
    MODEL_ERROR,
    SLOPE_LENGTH,
    SLOPE_SD,
    USUAL_PIVOT,
)
from ._loss_model import Array, bowls_of
from ._observations import Observation, arms_of, diverged, gain_of


@dataclass(frozen=True)
class Prior:
    """The prior distribution of the three values that the fit estimates.

    Args:
        drift_sd: standard deviation of the drift, octaves per octave of rank.
        full_sd: standard deviation of log2 of the factor of full finetuning, octaves.
        pivot: the rank that the base learning rate is defined for.
        full_reach: log2(n / pivot) if the drift continues up to full finetuning at r = n, or 0 if
            it does not.
        scatter: standard deviation of the optima of single ranks around the law, octaves.
    """

    drift_sd: float = DRIFT["A"][1]
    full_sd: float = FULL_SD["A"]
    pivot: float = USUAL_PIVOT
    full_reach: float = 0.0
    scatter: float = MODEL_ERROR

    def row(self, rank: int | None) -> Array:
        """Return the row of the design matrix for a rank, or for full finetuning (None).

        The row is the gradient of the rank's optimum with respect to (base, drift, factor).
        """
        if rank is None:
            return np.array([1.0, self.full_reach, 1.0])
        return np.array([1.0, math.log2(rank / self.pivot), 0.0])


def prior_of(
    reference: Reference, ranks: Iterable[int | None], full_fan_in: float | None
) -> Prior:
    """Create the prior for a fit from the init, the method and the ranks of the trials.

    Args:
        reference: the configuration of the base learning rate.
        ranks: the ranks of the trials, with None for full finetuning.
        full_fan_in: the width on which full finetuning's learning rate depends.
    """
    # With the pivot at the geometric mean of the ranks, the errors of base and drift are almost
    # uncorrelated.
    logs = [math.log(rank) for rank in ranks if rank is not None]
    pivot = round(math.exp(sum(logs) / len(logs)), 9) if logs else USUAL_PIVOT
    drift_sd = DRIFT[reference.init][1]
    if reference.method == "full":
        # The base learning rate belongs to full finetuning itself, so there is no factor to fit.
        return Prior(drift_sd, CERTAIN, pivot)
    # With init B, the drift with rank continues up to full rank, which is the width of the model.
    to_full = (full_fan_in or pivot) if reference.init == "B" else pivot
    return Prior(drift_sd, FULL_SD[reference.init], pivot, math.log2(to_full / pivot))


def centred_law(
    law: Law,
    reference: Reference,
    pivot: float,
    drift: float = 0.0,
    factor: float = 0.0,
) -> Power:
    """Add the prior mean of the drift and the fitted corrections to a scaling law.

    Args:
        law: the scaling law for the optimizer.
        reference: the configuration of the base learning rate. If it is full finetuning, the law
            gets no correction.
        pivot: the rank that the base learning rate is defined for.
        drift: the fitted drift, octaves per octave of rank.
        factor: log2 of the fitted factor of full finetuning, octaves.
    """
    if reference.method == "full":
        return Power(law=law)
    # A `Falling` law already contains the expected drift, which must not be added twice.
    falls = any(isinstance(each, Falling) for each in layers_of(law))
    mean = 0.0 if falls else DRIFT[reference.init][0]
    return Power(
        exponent=mean + drift,
        full_factor=2.0**factor,
        pivot=pivot,
        to_full=reference.init == "B",
        law=law,
    )


@dataclass(frozen=True)
class Fit:
    """The result of a fit, as deviations from the scaling law that `centred_law` returns.

    Args:
        prior: the prior of the fit.
        mean: posterior mean of (base, drift, log2 full_factor), octaves.
        covariance: posterior covariance of these three values, octaves².
        steepness: steepness of the loss above the optimum, per octave.
        ceiling: x of the smallest learning rate that diverged, or None if no trial diverged.
        vertices: mean and standard deviation of each rank's optimum before the regression,
            octaves.
    """

    prior: Prior
    mean: Array
    covariance: Array
    steepness: float
    ceiling: float | None
    vertices: dict[int | None, tuple[float, float]]

    def best(self, rank: int | None) -> float:
        """Return log2 of the best base learning rate for a rank, or for full finetuning (None)."""
        return float(self.prior.row(rank) @ self.mean)


@np.errstate(all="ignore")
def fit_observations(observations: Sequence[Observation], prior: Prior) -> Fit | None:
    """Fit the model to the trials of all ranks, or return None if every trial diverged."""
    lost = diverged(observations)
    ended = [o for o in observations if o not in lost]
    if not ended:
        return None
    ended_first = sorted(observations, key=lost.__contains__)
    arms = arms_of(ended_first, lost, gain_of(ended))
    bowls = bowls_of(arms)
    rows = np.array([prior.row(rank) for rank in arms])
    means, covariances, agreement = _shrunk(rows, bowls.mean, bowls.sd, prior)
    logs = bowls.log_weight + agreement
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()

    # The posterior is a mixture of one normal distribution per shape. The covariance of a mixture
    # is the mean of the covariances plus the covariance of the means.
    mean = weights @ means
    deviation = means - mean
    between_shapes = np.einsum("s,si,sj->ij", weights, deviation, deviation)
    vertices = weights @ bowls.mean
    variances = weights @ (bowls.sd**2 + (bowls.mean - vertices) ** 2)
    pairs = zip(vertices.tolist(), np.sqrt(variances).tolist(), strict=True)
    return Fit(
        prior=prior,
        mean=mean,
        covariance=np.einsum("s,sij->ij", weights, covariances) + between_shapes,
        steepness=float(weights @ bowls.steepness),
        ceiling=min((o.x for o in lost), default=None),
        vertices=dict(zip(arms, pairs, strict=True)),
    )


def _shrunk(
    rows: Array, means: Array, sds: Array, prior: Prior
) -> tuple[Array, Array, Array]:
    """For each shape, estimate (base, drift, factor) by a linear regression on the ranks' optima.

    The posterior of this regression is exact, because the errors and the prior have normal
    distributions.

    Args:
        rows: design vectors of the ranks, (arms, 3).
        means: means of the ranks' optima, (shapes, arms).
        sds: standard deviations of the ranks' optima, (shapes, arms).
        prior: the prior.

    Returns:
        The posterior mean (shapes, 3), covariance (shapes, 3, 3) and log evidence (shapes,).
    """
    prior_sd = np.array([BASE_SD, prior.drift_sd, prior.full_sd])
    weights = 1.0 / (sds**2 + prior.scatter**2)
    # The prior of the base learning rate is centred on the mean of the optima. It is so wide that
    # the centre does not affect the result, but residuals near zero are numerically more accurate.
    middle = means.mean()
    residuals = means - middle
    score = (weights * residuals) @ rows
    information = np.diag(prior_sd**-2) + np.einsum(
        "sa,ai,aj->sij", weights, rows, rows
    )
    covariance = np.linalg.inv(information)
    mean = np.einsum("sij,sj->si", covariance, score)
    misfit = (weights * residuals**2).sum(axis=1) - (mean * score).sum(axis=1)
    logdet = np.linalg.slogdet(information)[1]
    evidence = 0.5 * (np.log(weights).sum(axis=1) - misfit - logdet)
    mean[:, 0] += middle
    return mean, covariance, evidence


# --- another number of steps ----------------------------------------------------------------------


def steps_variance(octaves: float, slope_sd: float = SLOPE_SD) -> float:
    """Return the additional variance of the best learning rate for a different number of steps.

    The result is the variance of log2 of the best learning rate. The equation for the
    additional variance is in the docstring of this module.

    Args:
        octaves: log2 of the ratio of the two numbers of steps, of either sign.
        slope_sd: standard deviation of the slope, octaves of learning rate per octave of steps.
    """
    u = abs(octaves) / SLOPE_LENGTH
    return 2.0 * (slope_sd * SLOPE_LENGTH) ** 2 * (u + math.expm1(-u))


def at_target(fit: Fit, octaves: float) -> Fit:
    """Adjust a fit to a final run that has a different number of steps than the trials.

    octaves: log2(steps of the final run / steps of the trials).
    """
    added = np.diag([steps_variance(octaves), 0.0, 0.0])
    return replace(fit, covariance=fit.covariance + added)
