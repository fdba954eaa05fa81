"""The fit: from scored trials to a base learning rate, a drift with rank, a factor of full
finetuning, and their covariance.

There are two steps. First, `bowls_of` finds the optimum v of each rank, for every shape of the bowl
and size of the noise. Second, for each shape, the optima are shrunk towards the law:

    v(r) = base + drift·log2(r / pivot)
    v(full) = base + drift·full_reach + factor

The drift and the factor have the prior mean zero, because x is measured along a law at its prior
means (`centred_law`): each trial's learning rate is converted to the reference by that law, so only
the departure from the law is left to fit. The posterior is a mixture over shapes. The weight of a
shape is how well it explains the losses and how well its optima agree with one line.

**Another number of steps.** The trials do not show how the optimum changes from their steps to a
longer target, and other tasks do not tell: best learning rates rise on some and fall on others
(longer.md, benchmarks/answers.md). So the learning rate stays, and its interval widens. Let u be
|log2(target / steps)|, and σ the standard deviation of the slope on other tasks, in octaves of
learning rate per octave of steps. The slope is modelled as a stationary Gaussian process in
log2(steps) with the correlation exp(−u/λ). The optimum is its integral, so over u octaves it has
the variance

    2·σ²·λ²·(u/λ + exp(−u/λ) − 1)

Its standard deviation is σ·u at first, and grows as the root of u beyond λ.
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
    """The prior of the fit.

    Args:
        drift_sd: standard deviation of the drift, octaves per octave of rank.
        full_sd: standard deviation of log2 of the factor of full finetuning, octaves.
        pivot: the rank at which the base learning rate is defined.
        full_reach: log2(n / pivot) if the drift continues up to full finetuning at r = n, else 0.
        scatter: standard deviation of a rank's own optimum about the law, octaves.
    """

    drift_sd: float = DRIFT["A"][1]
    full_sd: float = FULL_SD["A"]
    pivot: float = USUAL_PIVOT
    full_reach: float = 0.0
    scatter: float = MODEL_ERROR

    def row(self, rank: int | None) -> Array:
        """Return the design vector of a rank, None for full finetuning: the gradient of its optimum
        with respect to (base, drift, factor).
        """
        if rank is None:
            return np.array([1.0, self.full_reach, 1.0])
        return np.array([1.0, math.log2(rank / self.pivot), 0.0])


def prior_of(
    reference: Reference, ranks: Iterable[int | None], full_fan_in: float | None
) -> Prior:
    """Return the prior of a fit.

    Args:
        reference: the configuration of the base learning rate.
        ranks: the ranks of the trials, None for full finetuning.
        full_fan_in: the width on which full finetuning's learning rate depends.
    """
    # At the geometric mean of the ranks the errors of base and drift hardly correlate.
    logs = [math.log(rank) for rank in ranks if rank is not None]
    pivot = round(math.exp(sum(logs) / len(logs)), 9) if logs else USUAL_PIVOT
    drift_sd = DRIFT[reference.init][1]
    if reference.method == "full":
        # The base learning rate belongs to full finetuning itself, so there is no factor to fit.
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
    """Return a law at the means of the prior, with a fitted drift and factor added.

    Args:
        law: the law, bound to the optimizer.
        reference: the configuration of the base learning rate. If it is full finetuning, nothing is
            added.
        pivot: the rank at which the base learning rate is defined.
        drift: the fitted drift, octaves per octave of rank.
        factor: log2 of the fitted factor of full finetuning, octaves.
    """
    if reference.method == "full":
        return Power(law=law)
    falls = any(isinstance(each, Falling) for each in layers_of(law))
    mean = (
        0.0 if falls else DRIFT[reference.init][0]
    )  # no fall is expected beyond its own
    return Power(
        exponent=mean + drift,
        full_factor=2.0**factor,
        pivot=pivot,
        to_full=reference.init == "B",
        law=law,
    )


@dataclass(frozen=True)
class Fit:
    """The posterior of the fit, relative to the law at its prior means.

    Args:
        prior: the prior of the fit.
        mean: posterior mean of (base, drift, log2 full_factor), octaves.
        covariance: their covariance, octaves².
        steepness: steepness of the loss above the optimum, per octave.
        ceiling: x of the smallest learning rate that diverged, None if no trial did.
        vertices: mean and standard deviation of each rank's optimum before it is shrunk, octaves.
    """

    prior: Prior
    mean: Array
    covariance: Array
    steepness: float
    ceiling: float | None
    vertices: dict[int | None, tuple[float, float]]

    def best(self, rank: int | None) -> float:
        """Return log2 of the base learning rate that is best at a rank, None for full
        finetuning.
        """
        return float(self.prior.row(rank) @ self.mean)


@np.errstate(all="ignore")
def fit_observations(observations: Sequence[Observation], prior: Prior) -> Fit | None:
    """Fit all trials together. Return None if every trial diverged."""
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

    # Mean and covariance of a mixture: the mean of the shapes' covariances, and the covariance of
    # their means.
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
    """Return the posterior mean (shapes, 3), covariance (shapes, 3, 3) and log evidence (shapes,)
    of (base, drift, factor).

    It is the linear regression of the arms' optima on their design vectors, with normal errors and
    a normal prior, once for each shape.

    Args:
        rows: design vectors, (arms, 3).
        means: means of the arms' optima, (shapes, arms).
        sds: their standard deviations, (shapes, arms).
        prior: the prior.
    """
    prior_sd = np.array([BASE_SD, prior.drift_sd, prior.full_sd])
    weights = 1.0 / (sds**2 + prior.scatter**2)
    # The prior of the base learning rate is centred on the middle of the optima.
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
    """Return the variance of log2 of the best learning rate over octaves of steps, up or down."""
    u = abs(octaves) / SLOPE_LENGTH
    return 2.0 * (slope_sd * SLOPE_LENGTH) ** 2 * (u + math.expm1(-u))


def at_target(fit: Fit, octaves: float) -> Fit:
    """Return a fit at the steps of the target run. octaves: log2(target / steps of the trials)."""
    added = np.diag([steps_variance(octaves), 0.0, 0.0])
    return replace(fit, covariance=fit.covariance + added)
