"""The fit: from scored trials to a base rate, a drift in rank, a factor of full finetuning, and
their covariance.

There are two steps. First, `bowls_of` finds each rank's optimum v for every shape of the bowl and
size of the noise. Second, for each shape the optima are shrunk towards the law:

    v(r) = base + drift·log2(r / pivot),   v(full) = base + drift·full_reach + factor

The drift and the factor have prior mean zero, since x is measured along the prior-centred law. The
posterior is a mixture over shapes, weighted by how well each explains the losses and how well its
optima agree.

How they move from the steps of the trials to those of a longer target no trial shows, and other
tasks do not tell: rates rise in some and fall in others (longer.md, benchmarks/answers.md). So the
rate stays, and its band grows. Let u = |log2(target / steps)|, and σ the standard deviation of the
slope on other tasks, in octaves of rate per octave of steps. The slope is a stationary Gaussian
process with the correlation exp(−u/λ), so over u octaves the best rate has the variance

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
        full_sd: standard deviation of log2 of the full-finetuning factor, octaves.
        pivot: the rank at which the base rate is defined.
        full_reach: log2(n / pivot) if the drift continues to full finetuning, else 0.
        scatter: standard deviation of a rank's own optimum about the law, octaves.
    """

    drift_sd: float = DRIFT["A"][1]
    full_sd: float = FULL_SD["A"]
    pivot: float = USUAL_PIVOT
    full_reach: float = 0.0
    scatter: float = MODEL_ERROR

    def row(self, rank: int | None) -> Array:
        """Return the design vector of a rank: the gradient of its optimum with respect to (base,
        drift, factor).
        """
        if rank is None:
            return np.array([1.0, self.full_reach, 1.0])
        return np.array([1.0, math.log2(rank / self.pivot), 0.0])


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
    """The posterior of the fit, relative to the prior-centred law.

    Args:
        prior: the prior of the fit.
        mean: posterior mean of (base, drift, log2 full_factor), octaves.
        covariance: their covariance, octaves².
        steepness: steepness of the loss above the optimum, per octave.
        ceiling: x of the smallest rate that diverged, or None.
        vertices: (mean, sd) of each rank's optimum before shrinking, octaves.
    """

    prior: Prior
    mean: Array
    covariance: Array
    steepness: float
    ceiling: float | None
    vertices: dict[int | None, tuple[float, float]]

    def best(self, rank: int | None) -> float:
        """Return log2 of the base rate that is best at a rank, None for full finetuning."""
        return float(self.prior.row(rank) @ self.mean)


@np.errstate(all="ignore")
def fit_observations(observations: Sequence[Observation], prior: Prior) -> Fit | None:
    """Fit all trials together. Return None if no run stayed finite."""
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
    """Return mean (s, u), covariance (s, u, u) and log evidence (s,). means, sds: (s, arms), for
    each shape s.
    """
    prior_sd = np.array([BASE_SD, prior.drift_sd, prior.full_sd])
    weights = 1.0 / (sds**2 + prior.scatter**2)
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
    """Return the variance of log2 of a best rate over octaves of steps, up or down."""
    u = abs(octaves) / SLOPE_LENGTH
    return 2.0 * (slope_sd * SLOPE_LENGTH) ** 2 * (u + math.expm1(-u))


def at_target(fit: Fit, octaves: float) -> Fit:
    """Return a fit at the target's steps, log2(target / steps) octaves from those of its trials."""
    added = np.diag([steps_variance(octaves), 0.0, 0.0])
    return replace(fit, covariance=fit.covariance + added)
