"""The fit: from scored trials to a base rate, a drift in rank, a factor of full finetuning, and their covariance.

Two steps. First, the loss over x = log2 of the rate is a Linex bowl per rank,

    loss(x) = c + k·(exp(a·u) − a·u − 1),   u = x − v

gentle below its vertex v and a cliff above it, and capped where a run is no better than untrained, so that diverged
runs say where the cliff is without saying how deep; k and a are shared, c has an offset per seed, and v is integrated
on a grid. Second, the vertices are shrunk towards the law:

    v(r) = base + drift·log2(r / pivot),   v(full) = base + factor

with drift and factor of prior mean zero, since x is measured along the prior-centred law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Fit", "MODEL_ERROR", "Observation", "Prior", "fit_observations", "shrink"]

Array = npt.NDArray[np.float64]

_STEEPNESS = np.array([0.5, 1.0, 2.0, 3.0])  # a, per octave: from near a parabola to a cliff within an octave
_CURVATURE = np.geomspace(0.002, 0.5, 14)  # k, in units of the gain
_GRID = 0.1  # octaves between candidate vertices
_REACH = 3.0  # octaves beyond the rates tried that a vertex may lie
_CAP = 1.0  # gap to the best, in units of the gain, at which a run counts as no better than untrained
_NOISE = 0.03  # prior noise of a score near the optimum, in units of the gain
_GAP_NOISE = 0.3  # and what is added of a run's gap to the best: far from the optimum the shape is only roughly known
_SEED_NOISE = 0.03  # prior spread of a seed's own offset, in units of the gain
MODEL_ERROR = 0.15  # octaves: what an exact vertex would still miss
_DIVERGED = 0.25  # a run that ends this share of the gain above its start has diverged


@dataclass(frozen=True)
class Observation:
    """One finished trial. rank: None for full finetuning. x: log2 of the base rate. value: the score, minimised.

    start, tail: first value and mean of the last tenth of what the loop yielded. returned: whether the score was
    returned rather than that mean. stopped: cut short because it diverged.
    """

    rank: int | None
    seed: int
    x: float
    value: float
    start: float
    tail: float
    returned: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class Prior:
    """Standard deviations of drift (octaves per octave of rank) and of log2 full_factor, and the drift's pivot rank.

    full_reach: log2(n / pivot) where the drift continues to full finetuning, else 0.
    """

    drift_sd: float = 0.15
    full_sd: float = 0.4
    pivot: float = 16.0
    full_reach: float = 0.0


@dataclass(frozen=True)
class Fit:
    """Posterior mean and covariance of (base, drift, log2 full_factor), octaves, relative to the prior-centred law.

    lean: octaves by which a quoted rate stays low: a·sd²/2, the optimum of the Linex loss under the posterior, and
    at least what keeps it an octave below the ceiling. ceiling: x of the smallest rate that diverged, or None.
    vertices: (mean, sd) of each arm's optimum before shrinking. noise: of a score near the optimum.
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

    Where no run gained anything, ending above the start is enough, unless scores were returned: a curve that only
    rises may then be of another kind.
    """
    gains = [o.start - o.tail for o in observations if math.isfinite(o.tail)]
    margin = _DIVERGED * max([g for g in gains if g > 0], default=0.0)
    return [
        o.stopped
        or not math.isfinite(o.value + o.tail)
        or ((margin > 0 or not o.returned) and o.tail > o.start + margin)
        for o in observations
    ]


def fit_observations(observations: Sequence[Observation], prior: Prior) -> Fit | None:
    """Fit all trials at once; None where no run stayed finite."""
    bad = diverged(observations)
    if all(bad):
        return None
    ceiling = min((float(o.x) for o, b in zip(observations, bad, strict=True) if b), default=None)
    gain = gain_of([o for o, b in zip(observations, bad, strict=True) if not b])
    arms = _arms(observations, bad, gain)
    vertices, steepness, noise = _vertices(arms)
    mean, covariance = shrink(vertices, prior)
    sd = math.sqrt(covariance[0, 0])
    near = 0.0 if ceiling is None else mean[0] + 1.0 - ceiling
    lean = float(min(1.0, max(steepness * sd**2 / 2, near, 0.0)))
    return Fit(mean, covariance, lean, ceiling, vertices, noise * gain, gain)


def gain_of(good: Sequence[Observation]) -> float:
    """What training can gain, the unit of curvature and noise: the best fall of a curve from its start.

    Where scores were returned and are of another kind than the curve, it is the best score against a poor one.
    """
    values = np.array([o.value for o in good])
    fall = max(o.start - o.tail for o in good)
    apart = float(np.median([abs(o.value - o.tail) for o in good]))
    if fall <= 0 or apart > fall / 2:
        fall = float(np.quantile(values, 0.75) - values.min())
    return max(fall, 1e-6 * (1.0 + abs(float(values.min()))))


class _Arm(NamedTuple):
    """The trials of one rank: rates x, gaps y to its best in units of the gain, capped, and seeds."""

    x: Array
    y: Array
    seeds: npt.NDArray[np.int64]


def _arms(observations: Sequence[Observation], bad: Sequence[bool], gain: float) -> dict[int | None, _Arm]:
    arms = {}
    for rank in dict.fromkeys(o.rank for o in observations):
        mine = [(o, b) for o, b in zip(observations, bad, strict=True) if o.rank == rank]
        best = min((o.value for o, b in mine if not b), default=0.0)
        gaps = [_CAP if b else min((o.value - best) / gain, _CAP) for o, b in mine]
        arms[rank] = _Arm(np.array([o.x for o, _ in mine]), np.array(gaps), np.array([o.seed for o, _ in mine]))
    return arms


def _vertices(arms: dict[int | None, _Arm]) -> tuple[dict[int | None, tuple[float, float]], float, float]:
    """(mean, sd) of every arm's vertex over a, k and the grid; the mean steepness; the noise in units of the gain."""
    xs = np.concatenate([arm.x for arm in arms.values()])
    grid = np.arange(xs.min() - _REACH, xs.max() + _REACH, _GRID)
    misfits = {rank: _misfit(arm, grid) for rank, arm in arms.items()}
    best = float(sum(m.min(axis=2) for m in misfits.values()).min())
    scale2 = (4.0 + best) / (
        4.0 + max(len(xs) - 2 * len(arms), 0)
    )  # noise² in units of its prior, of four trials' weight
    evidence = sum(np.log(np.exp(-(m - m.min()) / (2 * scale2)).mean(axis=2) + 1e-300) for m in misfits.values())
    shape = _softmax(np.asarray(evidence))
    summary = {rank: _moments(m, shape, grid, scale2) for rank, m in misfits.items()}
    return summary, float((shape.sum(axis=1) * _STEEPNESS).sum()), _NOISE * math.sqrt(scale2)


def _misfit(arm: _Arm, grid: Array) -> Array:
    """Weighted squared misfit of one arm over (a, k, vertex), its level and its seeds' offsets integrated out."""
    noise = np.diag((_NOISE + _GAP_NOISE * arm.y) ** 2) + _SEED_NOISE**2 * (arm.seeds[:, None] == arm.seeds[None, :])
    precision = np.linalg.inv(noise)
    ones = precision.sum(axis=1)
    precision -= np.outer(ones, ones) / ones.sum()
    u = arm.x[None, :] - grid[:, None]  # (vertex, trial)
    au = _STEEPNESS[:, None, None] * u
    bowl = np.exp(np.minimum(au, 20.0)) - au - 1.0  # (a, vertex, trial)
    miss = arm.y - np.minimum(_CURVATURE[None, :, None, None] * bowl[:, None], _CAP)  # (a, k, vertex, trial)
    return np.asarray(((miss @ precision) * miss).sum(axis=-1))


def _moments(misfit: Array, shape: Array, grid: Array, scale2: float) -> tuple[float, float]:
    likelihood = np.exp(-(misfit - misfit.min(axis=2, keepdims=True)) / (2 * scale2))
    weight = (likelihood / likelihood.sum(axis=2, keepdims=True) * shape[:, :, None]).sum(axis=(0, 1))
    mean = float((weight * grid).sum())
    return mean, math.sqrt(float((weight * (grid - mean) ** 2).sum()))


def _softmax(logs: Array) -> Array:
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def shrink(vertices: dict[int | None, tuple[float, float]], prior: Prior) -> tuple[Array, Array]:
    """Gaussian posterior of (base, drift, factor) given the arms' vertices; exact, three unknowns."""
    information = np.diag([1e-6, prior.drift_sd**-2, prior.full_sd**-2])
    score = np.zeros(3)
    for rank, (mean, sd) in vertices.items():
        reach = prior.full_reach if rank is None else math.log2(rank / prior.pivot)
        row = np.array([1.0, reach, 1.0 if rank is None else 0.0])
        weight = 1.0 / (sd**2 + MODEL_ERROR**2)
        information += weight * np.outer(row, row)
        score += weight * mean * row
    covariance = np.linalg.inv(information)
    return covariance @ score, covariance
