"""Model of a rank's loss against x = log2 of the rate: a bowl of unknown shape and noise. Its
minimum is estimated.

Around its optimum v the loss, in units of the gain, is

    loss(x) = level + min(k·above(u), p)   for u = x − v ≥ 0,   above(u) = (exp(a·u) − a·u − 1)/a²   (a = 0: u²/2)
    loss(x) = level + min(k·below(u), 1)   for u < 0,           below(u) = h²·(√(1 + (u/h)²) − 1)

p is the plateau at rates that are too high. It is 1 (no better than untrained), or the largest gap
among the rank's runs if all of them learn the easy part and stall. Both values are kept and
weighted, as the shapes are.

k is the curvature at v (per octave²). a is the steepness of the cliff above v (per octave). h is
the distance below v at which the parabola becomes a straight line (octaves).

The noise has four parts. One is a level common to all runs of a seed. A smooth part and a white
part have standard deviation σ together. The last is the error of the shape itself, a share of the
gap to the best.

The posterior is over a grid of shapes (σ, h, a, k), weighted by prior and evidence. Ranks nearly
share a shape: each has its own, within `_OWN` of the shared one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# The grid of shapes.
NOISE = np.geomspace(0.002, 0.5, 6)  # σ, in units of the gain
REACH = np.array([0.4, 1.0, 4.0])  # h: from a corner to a parabola
STEEPNESS = np.array([0.0, 1.5, 3.0, 4.5])  # a: from a parabola to a cliff within half an octave
CURVATURE = np.geomspace(0.005, 2.0, 10)  # k, in units of the gain
_USUAL_NOISE, _NOISE_SD = 0.015, 1.2  # prior of σ: its median, and the standard deviation of log σ
_OWN = (
    0.5,
    0.7,
    1.0,
    0.7,
)  # standard deviations of a rank's log σ, log h, a and log k about the shared values
_SEED = 3.0  # standard deviation of a seed's level, in units of σ
_SMOOTH = 0.5  # share of σ² that is smooth in the rate
_SHAPE = 0.2  # error of the shape, as a share of the gap to the best
_LENGTH = 1.0  # correlation length of the smooth noise, octaves
_GRID = 0.125  # octaves between candidate optima
_BEYOND = 3.0  # octaves that an optimum may lie beyond the rates tried
_LEAST = 1e-250  # smallest likelihood, so that its logarithm is finite
# gap to the best, in units of the gain, at which a run counts as no better than untrained
CAP = 1.0


class Arm(NamedTuple):
    """The trials of one rank, or of full finetuning, arrays of shape (trials,).

    x: log2 of the rate. y: gap to the rank's best score, in units of the gain, at most `CAP`.
    seeds: whole numbers.
    """

    x: Array
    y: Array
    seeds: npt.NDArray[np.int64]


class Bowls(NamedTuple):
    """The optimum of every arm under every shape on the grid, and the weight of the shape.

    log_weight: (shapes,), log of prior times evidence. mean, sd: of the optima, (shapes, arms),
    octaves. noise, steepness: the shape's σ and a, (shapes,).
    """

    log_weight: Array
    mean: Array
    sd: Array
    noise: Array
    steepness: Array


def bowls_of(arms: Mapping[int | None, Arm]) -> Bowls:
    """Fit a bowl to every arm. A run at too high a rate ends untrained, or on a plateau if no run
    was that bad.
    """
    return Bowls(
        *map(np.concatenate, zip(*(_bowls_where(arms, p) for p in _plateaus(arms)), strict=True))
    )


def _plateaus(arms: Mapping[int | None, Arm]) -> list[list[float]]:
    """Return the plateaus of all arms, once for each choice that the runs allow."""
    untrained = [CAP] * len(arms)
    if any(arm.y.max() >= CAP for arm in arms.values()):
        return [untrained]
    return [untrained, [float(arm.y.max()) or CAP for arm in arms.values()]]


def _bowls_where(arms: Mapping[int | None, Arm], plateaus: Sequence[float]) -> Bowls:
    xs = np.concatenate([arm.x for arm in arms.values()])
    grid = np.arange(xs.min() - _BEYOND, xs.max() + _BEYOND, _GRID)
    fits = [
        _shared(_log_likelihood(arm, grid, p), grid)
        for arm, p in zip(arms.values(), plateaus, strict=True)
    ]
    noise, _, steepness, _ = (
        at.ravel() for at in np.meshgrid(NOISE, REACH, STEEPNESS, CURVATURE, indexing="ij")
    )
    evidence, mean, sd = (np.stack(of_arms, axis=1) for of_arms in zip(*fits, strict=True))
    return Bowls(_log_prior(noise) + evidence.sum(axis=1), mean, sd, noise, steepness)


def _log_prior(noise: Array) -> Array:
    return np.asarray(-0.5 * (np.log(noise / _USUAL_NOISE) / _NOISE_SD) ** 2)


def _log_likelihood(arm: Arm, grid: Array, plateau: float) -> Array:
    """Return log p(losses | σ, h, a, k, v) with the level integrated out, of shape (σ, h, a, k, v)."""
    return _levelled(arm, _gaps(arm.x[None, :] - grid[:, None], plateau))[0]


def _gaps(u: Array, plateau: float) -> Array:
    """Return the loss above its minimum under every shape, at octaves u from the optimum: (h, a, k,
    *u.shape).
    """
    below = np.stack([h**2 * (np.sqrt(1.0 + (u / h) ** 2) - 1.0) for h in REACH])
    cliffs = [(np.exp(np.clip(a * u, 0.0, 20.0)) - a * u - 1.0) / a**2 for a in STEEPNESS[1:]]
    above = np.stack([u**2 / 2, *cliffs])
    bowls = np.where(u < 0, below[:, None], above[None])  # of curvature 1: (h, a, *u.shape)
    highest = np.where(u < 0, CAP, plateau)
    by_curvature = CURVATURE.reshape(-1, *(1 for _ in u.shape))
    return np.asarray(np.minimum(by_curvature * bowls[:, :, None], highest))


def _covariances(arm: Arm) -> tuple[Array, Array]:
    """Return two covariances of the losses, (trials, trials): the noise in units of σ², and the
    error of the shape.
    """
    apart = arm.x[:, None] - arm.x[None, :]
    smooth = np.exp(-0.5 * (apart / _LENGTH) ** 2)
    paired = arm.seeds[:, None] == arm.seeds[None, :]
    noise = paired * (_SEED**2 + _SMOOTH * smooth) + (1.0 - _SMOOTH) * np.eye(len(arm.x))
    gap = _SHAPE * arm.y
    return noise, np.outer(gap, gap) * (smooth + np.eye(len(gap))) / 2


def _levelled(arm: Arm, gaps: Array) -> tuple[Array, Array]:
    """Return the log density of the losses about `gaps` plus a common level, and that level's mean,
    of shape (σ, ...).

    gaps: (..., trials). The level has a flat prior. One basis diagonalizes both covariances for
    every σ at once.
    """
    noise, shape = _covariances(arm)
    whiten = np.linalg.inv(np.linalg.cholesky(noise))
    variances, basis = np.linalg.eigh(whiten @ shape @ whiten.T)
    basis = whiten.T @ basis
    precision = 1.0 / (NOISE**2 + np.maximum(variances, 0.0)[:, None])  # (trials, σ)
    ones = basis.sum(axis=0)[:, None]
    miss = arm.y @ basis - gaps @ basis
    of_level = (ones**2 * precision).sum(axis=0)
    along = miss @ (ones * precision)
    logdet = np.linalg.slogdet(noise)[1] - np.log(precision).sum(axis=0) + np.log(of_level)
    logs = -0.5 * (np.square(miss) @ precision - along**2 / of_level + logdet)
    return np.moveaxis(logs, -1, 0), np.moveaxis(along / of_level, -1, 0)


def _shared(log_likelihood: Array, grid: Array) -> tuple[Array, Array, Array]:
    """Return an arm's log evidence and its optimum's mean and sd, given the shared shape. All have
    shape (shapes,).
    """
    top, middle = log_likelihood.max(), grid.mean()
    about = grid - middle
    powers = (np.exp(log_likelihood - top) + _LEAST) @ np.stack([about**0, about, about**2], axis=1)
    total, first, second = (_own_shapes() @ powers.reshape(-1, 3)).T
    mean = first / total
    variance = np.maximum(second / total - mean**2, (_GRID / 4) ** 2)
    return np.log(total / len(grid)) + top, mean + middle, np.sqrt(variance)


@cache
def _own_shapes() -> Array:
    """Return the probability of each shape as an arm's own, given the shared shape: (shapes,
    shapes), rows sum to 1.
    """
    kernel = np.ones((1, 1))
    for at, sd in zip(
        (np.log(NOISE), np.log(REACH), STEEPNESS, np.log(CURVATURE)), _OWN, strict=True
    ):
        weights = np.exp(-0.5 * ((at[:, None] - at[None, :]) / sd) ** 2)
        kernel = np.kron(kernel, weights / weights.sum(axis=1, keepdims=True))
    return kernel


# --- the curves of a fit --------------------------------------------------------------------------


def curves_of(
    arms: Mapping[int | None, Arm], u: Mapping[int | None, Array]
) -> dict[int | None, Array]:
    """Return every arm's expected gap at octaves `u` from its optimum, which must be at x = 0.

    This is the mean over the posterior of shapes, noise and levels that `bowls_of` uses, given the
    optima.
    """
    logs, parts = zip(
        *(_curves_where(arms, plateaus, u) for plateaus in _plateaus(arms)), strict=True
    )
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    return {
        rank: sum(w * part[rank] for w, part in zip(weights, parts, strict=True)) for rank in arms
    }


def _curves_where(
    arms: Mapping[int | None, Arm], plateaus: Sequence[float], u: Mapping[int | None, Array]
) -> tuple[float, dict[int | None, Array]]:
    """Return the log evidence of the optima under these plateaus, and every arm's mean curve."""
    pairs = list(zip(arms.values(), plateaus, strict=True))
    logs = np.stack([_log_likelihood(arm, np.zeros(1), plateau).ravel() for arm, plateau in pairs])
    own = np.exp(
        logs - logs.max(axis=1, keepdims=True)
    )  # likelihood of a shape as an arm's own: (arms, shapes)
    near = own @ _own_shapes().T + _LEAST  # and as the shared shape
    log_shared = _log_prior(np.repeat(NOISE, own.shape[1] // len(NOISE))) + np.log(near).sum(axis=0)
    shared = np.exp(log_shared - log_shared.max())
    belief = own * ((shared / near) @ _own_shapes())
    belief /= belief.sum(axis=1, keepdims=True)
    curves = [
        _mean_curve(*pair, b, u[rank]) for rank, pair, b in zip(arms, pairs, belief, strict=True)
    ]
    evidence = np.log(shared.sum()) + log_shared.max() + logs.max(axis=1).sum()
    return float(evidence), dict(zip(arms, curves, strict=True))


def _mean_curve(arm: Arm, plateau: float, belief: Array, u: Array) -> Array:
    """Return an arm's mean curve over its shapes, each at the level that the trials give it."""
    levels = _levelled(arm, _gaps(arm.x, plateau))[1]
    by_bowl = belief.reshape(len(NOISE), -1).sum(axis=0)
    return np.asarray(
        belief @ levels.ravel() + by_bowl @ _gaps(u, plateau).reshape(len(by_bowl), -1)
    )
