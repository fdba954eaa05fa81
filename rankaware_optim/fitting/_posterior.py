"""The fit: from scored trials to a base rate, a drift in rank, a factor of full finetuning, and
their covariance.

There are two steps. First, `bowls_of` finds each rank's optimum v for every shape of the bowl and
size of the noise. Second, for each shape the optima are shrunk towards the law:

    v(r) = base + drift·log2(r / pivot),   v(full) = base + drift·full_reach + factor

The drift and the factor have prior mean zero, since x is measured along the prior-centred law. The
posterior is a mixture over shapes, weighted by how well each explains the losses and how well its
optima agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._loss_model import bowls_of
from ._observations import CLEAR, Observation, arms_of, best_fall, gain_of, usual_noise, usual_start

Array = npt.NDArray[np.float64]

# Octaves: standard deviation of a rank's own best rate about a power of the rank. It was .29 over
# 21 sweeps of the study, .17 of which is noise (benchmarks/calibration/simulated.py scatter).
MODEL_ERROR = 0.2
_BASE_SD = 1e3  # octaves: a flat prior of the base rate
_DIVERGED = 0.25  # a run has diverged if it ends this share of the gain above its start
_ROSE = 2.0  # standard deviations of a value by which a curve ends clearly above its first value


@dataclass(frozen=True)
class Prior:
    """The prior of the fit.

    Args:
        drift_sd: standard deviation of the drift, octaves per octave of rank.
        full_sd: standard deviation of log2 of the full-finetuning factor, octaves.
        pivot: the rank at which the base rate is defined.
        full_reach: log2(n / pivot) if the drift continues to full finetuning, else 0.
        scatter: standard deviation of a rank's own optimum about the law, octaves.
        full_mean: mean of log2 of the full-finetuning factor, octaves. 0 unless the trials have
            fewer steps than the target.
    """

    drift_sd: float = 0.15
    full_sd: float = 0.8
    pivot: float = 16.0
    full_reach: float = 0.0
    scatter: float = MODEL_ERROR
    full_mean: float = 0.0

    def row(self, rank: int | None) -> Array:
        """Return the design vector of a rank: the gradient of its optimum with respect to (base,
        drift, factor).
        """
        reach = self.full_reach if rank is None else math.log2(rank / self.pivot)
        return np.array([1.0, reach, float(rank is None)])

    def mean(self) -> Array:
        """Return the prior mean of the unknowns. That of the base is 0, with a flat prior."""
        return np.array([0.0, 0.0, self.full_mean])

    def precision(self) -> Array:
        """Return the prior precision of the unknowns."""
        return np.diag([_BASE_SD**-2, self.drift_sd**-2, self.full_sd**-2])


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
        noise: standard deviation of a score near the optimum, in units of the loss.
        gain: what training gains, in units of the loss, see `gain_of`.
    """

    prior: Prior
    mean: Array
    covariance: Array
    steepness: float
    ceiling: float | None
    vertices: dict[int | None, tuple[float, float]]
    noise: float
    gain: float

    def best(self, rank: int | None) -> float:
        """Return log2 of the base rate that is best at a rank, None for full finetuning."""
        return float(self.prior.row(rank) @ self.mean)

    def sd(self, rank: int | None) -> float:
        """Return the standard deviation of `best`, octaves."""
        row = self.prior.row(rank)
        return math.sqrt(float(row @ self.covariance @ row))


def diverged(observations: Sequence[Observation]) -> list[bool]:
    """Return for each run whether it diverged: stopped as such, non-finite, or far above its start
    at the end.

    Far means a quarter of the best gain, and more than the noise of the curves explains. If no run
    gained anything, ending above the start by more than the noise is enough. This does not apply if
    scores were returned, because these may not be comparable with the curve.
    """
    usual, gain = usual_start(observations), best_fall(observations)
    margin = max(_DIVERGED * gain, CLEAR * usual_noise(observations))
    return [
        o.stopped
        or not math.isfinite(o.value + o.tail)
        or ((gain > 0 or not o.returned) and o.tail > max(o.start, usual) + margin)
        for o in observations
    ]


def below_cliff(observations: Sequence[Observation]) -> list[Observation]:
    """Return the observations below every rate that diverged. A run above such a rate was lucky."""
    lost = (o.x for o, bad in zip(observations, diverged(observations), strict=True) if bad)
    lowest = min(lost, default=math.inf)
    return [o for o in observations if o.x < lowest]


def all_rose(observations: Iterable[Observation]) -> bool:
    """Return whether every run's curve ended clearly above its first value, so that all rates may
    be too high.
    """
    return all(o.tail > o.first + _ROSE * o.noise for o in observations)


def none_learned(observations: Sequence[Observation]) -> bool:
    """Return whether no run shows that it learned, beyond the noise of the curves.

    A run shows it if its curve ended clearly below its first value, or clearly below another's end
    without a rise.
    """
    noise, highest = usual_noise(observations), max((o.tail for o in observations), default=0.0)
    rise, apart = _ROSE * noise, CLEAR * noise
    return not any(
        o.tail < max(o.first - rise, min(o.first + rise, highest - apart)) for o in observations
    )


def fit_observations(observations: Sequence[Observation], prior: Prior) -> Fit | None:
    """Fit all trials together. Return None if no run stayed finite."""
    bad = diverged(observations)
    if all(bad):
        return None
    lost = [o for o, b in zip(observations, bad, strict=True) if b]
    good = [o for o, b in zip(observations, bad, strict=True) if not b]
    gain = gain_of(good)
    arms = arms_of(observations, bad, gain)
    bowls = bowls_of(arms)
    means, covariances, agreement = _shrunk(_rows(arms, prior), bowls.mean, bowls.sd, prior)
    logs = bowls.log_weight + agreement
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    mean, covariance = _mixed(weights, means, covariances)
    vertices = {
        rank: _moments(weights, bowls.mean[:, i], bowls.sd[:, i]) for i, rank in enumerate(arms)
    }
    return Fit(
        prior=prior,
        mean=mean,
        covariance=covariance,
        steepness=float(weights @ bowls.steepness),
        ceiling=min((o.x for o in lost), default=None),
        vertices=vertices,
        noise=float(weights @ bowls.noise) * gain,
        gain=gain,
    )


def _mixed(weights: Array, means: Array, covariances: Array) -> tuple[Array, Array]:
    """Return the mean and covariance of a mixture of Gaussians."""
    mean = weights @ means
    about = means - mean
    spread = np.einsum("s,si,sj->ij", weights, about, about)
    return mean, np.einsum("s,sij->ij", weights, covariances) + spread


def _moments(weights: Array, means: Array, sds: Array) -> tuple[float, float]:
    mean, variance = _mixed(weights, means[:, None], sds[:, None, None] ** 2)
    return float(mean[0]), math.sqrt(float(variance[0, 0]))


def shrink(vertices: Mapping[int | None, tuple[float, float]], prior: Prior) -> tuple[Array, Array]:
    """Return the exact Gaussian posterior (mean, covariance) of the unknowns, given the ranks'
    vertices.
    """
    means, sds = np.array(list(vertices.values())).T[:, None, :]
    mean, covariance, _ = _shrunk(_rows(vertices, prior), means, sds, prior)
    return mean[0], covariance[0]


def _rows(ranks: Iterable[int | None], prior: Prior) -> Array:
    return np.array([prior.row(rank) for rank in ranks])


def _shrunk(rows: Array, means: Array, sds: Array, prior: Prior) -> tuple[Array, Array, Array]:
    """Return mean (s, u), covariance (s, u, u) and log evidence (s,). means, sds: (s, arms), for
    each shape s.
    """
    weights = 1.0 / (sds**2 + prior.scatter**2)
    expected = prior.mean()
    means = means - rows @ expected
    middle = means.mean()
    score = (weights * (means - middle)) @ rows
    information = prior.precision() + np.einsum("sa,ai,aj->sij", weights, rows, rows)
    covariance = np.linalg.inv(information)
    mean = np.einsum("sij,sj->si", covariance, score)
    misfit = (weights * (means - middle) ** 2).sum(axis=1) - (mean * score).sum(axis=1)
    evidence = 0.5 * (np.log(weights).sum(axis=1) - misfit - np.linalg.slogdet(information)[1])
    mean += expected
    mean[:, 0] += middle
    return mean, covariance, evidence
