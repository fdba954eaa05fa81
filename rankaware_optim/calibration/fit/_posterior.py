"""The fit: from scored trials to a base rate, a drift in rank, a factor of full finetuning, and their covariance.

Two steps. First, `bowls_of` finds each rank's optimum v, under every shape of bowl and size of noise. Second, under
each shape the optima are shrunk towards the law:

    v(r) = base + drift·log2(r / pivot),   v(full) = base + drift·full_reach + factor

with drift and factor of prior mean zero, since x is measured along the prior-centred law. The answer is the mixture
over shapes, weighed by how well each explains the losses and how well its optima agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...recipe import Observation, arms_of, bowls_of, gain_of, usual_start

Array = npt.NDArray[np.float64]

MODEL_ERROR = 0.1  # octaves by which a rank's own best rate lies off the law
# Octaves: with few trials, more lost more than it saved (benchmarks/calibration/coverage.py --trials 3).
_MOST_LEAN = 0.5
_BASE_SD = 1e3  # octaves: nothing is believed of the base rate
_DIVERGED = 0.25  # a run that ends this share of the gain above its start has diverged


@dataclass(frozen=True)
class Prior:
    """Standard deviations of drift (octaves per octave of rank) and of log2 full_factor, and the drift's pivot rank.

    full_reach: log2(n / pivot) where the drift continues to full finetuning, else 0.
    """

    drift_sd: float = 0.15
    full_sd: float = 0.8
    pivot: float = 16.0
    full_reach: float = 0.0

    def row(self, rank: int | None) -> Array:
        """How the optimum at a rank, None for full finetuning, hangs on (base, drift, factor)."""
        reach = self.full_reach if rank is None else math.log2(rank / self.pivot)
        return np.array([1.0, reach, float(rank is None)])


@dataclass(frozen=True)
class Fit:
    """Posterior mean and covariance of (base, drift, log2 full_factor), octaves, relative to the prior-centred law.

    lean: octaves by which a quoted rate stays low: a·sd²/2, the best under a cliff of steepness a, but half an octave
    at most, or the more that keeps it an octave below the ceiling. ceiling: x of the smallest rate that diverged, or
    None. vertices: (mean, sd) of each arm's optimum before shrinking. noise: of a score near the optimum. gain: see
    `gain_of`; both in units of the loss.
    """

    mean: Array
    covariance: Array
    lean: float
    ceiling: float | None
    vertices: dict[int | None, tuple[float, float]]
    noise: float
    gain: float


def diverged(observations: Sequence[Observation]) -> list[bool]:
    """Which runs diverged: cut short, non-finite, or ended above their start by a quarter of the best gain seen.

    All runs start from one model, so a first value that is low by chance is held against none: their median stands
    for it. Where no run gained anything, ending above the start is enough, unless scores were returned: a curve that
    only rises may then be of another kind.
    """
    usual = usual_start(observations)
    gains = [usual - o.tail for o in observations if math.isfinite(o.tail) and o.tail < o.start]
    margin = _DIVERGED * max([g for g in gains if g > 0], default=0.0)
    return [
        o.stopped
        or not math.isfinite(o.value + o.tail)
        or ((margin > 0 or not o.returned) and o.tail > max(o.start, usual) + margin)
        for o in observations
    ]


def fit_observations(observations: Sequence[Observation], prior: Prior) -> Fit | None:
    """Fit all trials at once; None where no run stayed finite."""
    bad = diverged(observations)
    if all(bad):
        return None
    ceiling = min((float(o.x) for o, b in zip(observations, bad, strict=True) if b), default=None)
    gain = gain_of([o for o, b in zip(observations, bad, strict=True) if not b])
    arms = arms_of(observations, bad, gain)
    bowls = bowls_of(arms)
    means, covariances, agreement = _shrunk(_rows(arms, prior), bowls.mean, bowls.sd, prior)
    logs = bowls.log_weight + agreement
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    mean, covariance = _mixed(weights, means, covariances)
    vertices = {rank: _moments(weights, bowls.mean[:, i], bowls.sd[:, i]) for i, rank in enumerate(arms)}
    near = 0.0 if ceiling is None else mean[0] + 1.0 - ceiling
    doubt = min(float(weights @ bowls.steepness * covariance[0, 0]) / 2, _MOST_LEAN)
    lean = max(doubt, float(min(near, 1.0)))
    return Fit(mean, covariance, lean, ceiling, vertices, float(weights @ bowls.noise) * gain, gain)


def _mixed(weights: Array, means: Array, covariances: Array) -> tuple[Array, Array]:
    """Mean and covariance of a mixture of Gaussians."""
    mean = weights @ means
    about = means - mean
    spread = np.einsum("s,si,sj->ij", weights, about, about)
    return mean, np.einsum("s,sij->ij", weights, covariances) + spread


def _moments(weights: Array, means: Array, sds: Array) -> tuple[float, float]:
    mean, variance = _mixed(weights, means[:, None], sds[:, None, None] ** 2)
    return float(mean[0]), math.sqrt(float(variance[0, 0]))


def shrink(vertices: Mapping[int | None, tuple[float, float]], prior: Prior) -> tuple[Array, Array]:
    """Gaussian posterior of (base, drift, factor) given the arms' vertices; exact, three unknowns."""
    means, sds = np.array(list(vertices.values())).T[:, None, :]
    mean, covariance, _ = _shrunk(_rows(vertices, prior), means, sds, prior)
    return mean[0], covariance[0]


def _rows(ranks: Iterable[int | None], prior: Prior) -> Array:
    return np.array([prior.row(rank) for rank in ranks])


def _shrunk(rows: Array, means: Array, sds: Array, prior: Prior) -> tuple[Array, Array, Array]:
    """Mean (s, 3), covariance (s, 3, 3) and log evidence (s,) for every shape s of `means` and `sds` (s, arms)."""
    weights = 1.0 / (sds**2 + MODEL_ERROR**2)
    known = np.diag([_BASE_SD**-2, prior.drift_sd**-2, prior.full_sd**-2])
    middle = means.mean()
    score = (weights * (means - middle)) @ rows
    information = known + np.einsum("sa,ai,aj->sij", weights, rows, rows)
    covariance = np.linalg.inv(information)
    mean = np.einsum("sij,sj->si", covariance, score)
    misfit = (weights * (means - middle) ** 2).sum(axis=1) - (mean * score).sum(axis=1)
    evidence = 0.5 * (np.log(weights).sum(axis=1) - misfit - np.linalg.slogdet(information)[1])
    mean[:, 0] += middle
    return mean, covariance, evidence
