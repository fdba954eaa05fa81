"""The loss model: a rank's loss against x = log2 of the learning rate is a bowl of unknown shape.

The loss is in units of the *gain*, the improvement of the best run over an untrained model: 0 is
the best score and 1 is no better than untrained. At u = x − v octaves from the optimum v,

    loss(x) = level + min(k·above(u), p)    for u ≥ 0
    loss(x) = level + min(k·below(u), 1)    for u < 0

    above(u) = (exp(a·u) − a·u − 1)/a²,  or u²/2 for a = 0
    below(u) = h²·(√(1 + (u/h)²) − 1)

Both sides are the parabola k·u²/2 near the optimum. Above it the loss may rise as steeply as a
cliff. Below it the loss rises more slowly, as a straight line.

    k    curvature at the optimum, per octave²
    a    steepness of the cliff above it, per octave. 0 is a parabola without a cliff
    h    octaves below the optimum at which the parabola becomes a straight line
    p    plateau of learning rates that are too high. It is 1 (untrained), or the largest gap of the
         rank's runs if all of them learn the easy part and then stall. Both are kept and weighted
    σ    standard deviation of the noise, in units of the gain

The noise has four parts: a level that all runs of a seed share; a part that is smooth in x and a
white part, which have the standard deviation σ together; and the error of the shape itself, which
is a share of the gap to the best.

The posterior is computed on a grid of shapes (σ, h, a, k) and of optima v. A shape's weight is its
prior times its evidence, which is how well it explains the losses. Ranks nearly share a shape: a
rank has its own, which is within `OF_RANK_SDS` of the shared one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ._constants import (
    BEYOND,
    CURVATURE,
    GRID,
    LENGTH,
    NOISE,
    NOISE_SD,
    OF_RANK_SDS,
    SEED_SD,
    SHAPE_ERROR,
    SHOULDERS,
    SMOOTH,
    STEEPNESS,
    UNTRAINED_GAP,
    USUAL_NOISE,
)

Array = npt.NDArray[np.float64]

_SHAPES = np.meshgrid(NOISE, SHOULDERS, STEEPNESS, CURVATURE, indexing="ij")
_NOISE_OF_SHAPE, _, _STEEPNESS_OF_SHAPE, _ = (values.ravel() for values in _SHAPES)
LOG_PRIOR = -0.5 * (np.log(_NOISE_OF_SHAPE / USUAL_NOISE) / NOISE_SD) ** 2


class Arm(NamedTuple):
    """The trials of one rank, or of full finetuning, as arrays of shape (trials,).

    x: log2 of the learning rate.
    y: gap to the rank's best score, in units of the gain, at most `UNTRAINED_GAP`.
    seeds: whole numbers.
    """

    x: Array
    y: Array
    seeds: npt.NDArray[np.int64]


class Bowls(NamedTuple):
    """The optimum of every arm under every shape on the grid, and the weight of the shape.

    log_weight: log of prior times evidence, (shapes,).
    mean, sd: mean and standard deviation of the optima, (shapes, arms), octaves.
    steepness: the shape's a, (shapes,).
    """

    log_weight: Array
    mean: Array
    sd: Array
    steepness: Array


Arms = Mapping[int | None, Arm]  # by rank, None for full finetuning


def bowls_of(arms: Arms) -> Bowls:
    """Fit a bowl to every arm.

    A learning rate that is too high leaves a run untrained. If no run was that bad, the worst run
    may lie on a plateau instead, so both are fitted and their shapes weighted together.
    """
    choices = [_bowls_where(arms, [UNTRAINED_GAP] * len(arms))]
    highest = [float(arm.y.max()) for arm in arms.values()]
    if max(highest) < UNTRAINED_GAP:
        choices.append(_bowls_where(arms, [gap or UNTRAINED_GAP for gap in highest]))
    return Bowls(*map(np.concatenate, zip(*choices, strict=True)))


def plateaus_of(arm: Arm) -> list[float]:
    """Return the plateaus that a single arm may have: the gap of an untrained run, and the gap of
    its own worst run if all of its runs are better than untrained.
    """
    highest = float(arm.y.max())
    if 0.0 < highest < UNTRAINED_GAP:
        return [UNTRAINED_GAP, highest]
    return [UNTRAINED_GAP]


def optima_of(arms: Arms) -> Array:
    """Return the candidate optima: a grid over all learning rates tried, and `BEYOND` octaves on
    either side.
    """
    xs = np.concatenate([arm.x for arm in arms.values()])
    span = float(xs.max() - xs.min()) + 2 * BEYOND
    count = math.ceil(round(span / GRID, 6))  # the same count whatever rounding does
    return np.asarray(xs.min() - BEYOND + GRID * np.arange(count))


def _bowls_where(arms: Arms, plateaus: Sequence[float]) -> Bowls:
    """Fit a bowl to every arm. plateaus: the plateau of each arm."""
    optima = optima_of(arms)
    fits = []
    for arm, plateau in zip(arms.values(), plateaus, strict=True):
        fits.append(_optimum(log_likelihood(arm, optima, plateau), optima))
    evidence, mean, sd = np.stack(fits, axis=-1)
    log_weight = LOG_PRIOR + evidence.sum(axis=1)
    return Bowls(log_weight, mean, sd, _STEEPNESS_OF_SHAPE)


def bowl_gap(u: Array, h: Array, a: Array, k: Array, plateau: Array | float) -> Array:
    """Return the loss above its minimum at u octaves from the optimum. The shape (h, a, k) and the
    plateau are arrays that broadcast with u.
    """
    below = h**2 * (np.sqrt(1.0 + (u / h) ** 2) - 1.0)
    steepness = np.where(a == 0.0, 1.0, a)  # a parabola has no cliff to divide by
    cliff = (np.exp(np.clip(a * u, 0.0, 20.0)) - a * u - 1.0) / steepness**2
    above = np.where(a == 0.0, u**2 / 2, cliff)
    curvature_one = np.where(u < 0, below, above)
    highest = np.where(u < 0, UNTRAINED_GAP, plateau)
    return np.asarray(np.minimum(k * curvature_one, highest))


def gaps_of(u: Array, plateau: float) -> Array:
    """Return the loss above its minimum under every shape, at u octaves from the optimum. The
    result has the shape (h, a, k, *u.shape).
    """
    inner = [1] * u.ndim
    h = SHOULDERS.reshape(-1, 1, 1, *inner)
    a = STEEPNESS.reshape(-1, 1, *inner)
    k = CURVATURE.reshape(-1, *inner)
    return bowl_gap(u, h, a, k, plateau)


def _covariances(arm: Arm) -> tuple[Array, Array]:
    """Return two covariances of the losses, each (trials, trials): of the noise, in units of σ²,
    and of the error of the shape.
    """
    white = np.eye(len(arm.x))
    paired = arm.seeds[:, None] == arm.seeds[None, :]
    smooth = SMOOTH * _alike(arm)
    noise = paired * (SEED_SD**2 + smooth) + (1.0 - SMOOTH) * white
    return noise, error_of_shape(arm)


def _alike(arm: Arm) -> Array:
    """Return the correlation of smooth errors between the learning rates of trials."""
    distance = arm.x[:, None] - arm.x[None, :]
    return np.asarray(np.exp(-0.5 * (distance / LENGTH) ** 2))


def smooth_noise(arm: Arm) -> Array:
    """Return the correlation of the smooth part of the noise, which runs of a seed share."""
    return np.asarray((arm.seeds[:, None] == arm.seeds[None, :]) * _alike(arm))


def error_of_shape(arm: Arm) -> Array:
    """Return the covariance of the error of the shape, which grows with the gap to the best."""
    gap = SHAPE_ERROR * arm.y
    return np.outer(gap, gap) * (_alike(arm) + np.eye(len(arm.x))) / 2


def log_likelihood(arm: Arm, optima: Array, plateau: float) -> Array:
    """Return log p(losses | shape, optimum), (σ, h, a, k, optima).

    The losses are normal about level + gap, with the covariance σ²·noise + shape. A basis in which
    the noise is the identity and the shape's error is diagonal makes this covariance diagonal for
    every σ at once, so no matrix is inverted per shape. The level has a flat prior and is
    integrated out: its best value is subtracted from the misfit, and the log of its precision is
    added to the log determinant.
    """
    gaps = gaps_of(arm.x[None, :] - optima[:, None], plateau)
    noise, shape = _covariances(arm)
    whiten = np.linalg.inv(np.linalg.cholesky(noise))
    variances, basis = np.linalg.eigh(whiten @ shape @ whiten.T)
    basis = whiten.T @ basis
    precision = 1.0 / (NOISE**2 + np.maximum(variances, 0.0)[:, None])  # (trials, σ)
    ones = basis.sum(axis=0)[:, None]  # the level, which is the same for every trial
    miss = arm.y @ basis - gaps @ basis  # (h, a, k, optima, trials)
    level_precision = (ones**2 * precision).sum(axis=0)
    projection = miss @ (ones * precision)
    misfit = np.square(miss) @ precision - projection**2 / level_precision
    logdet = (
        np.linalg.slogdet(noise)[1]
        - np.log(precision).sum(axis=0)
        + np.log(level_precision)
    )
    return np.moveaxis(-0.5 * (misfit + logdet), -1, 0)


def evidence_of(likelihoods: Array) -> Array:
    """Return an arm's log evidence for each shared shape, from `log_likelihood`: (shapes,)."""
    return _optimum(likelihoods, np.arange(float(likelihoods.shape[-1])))[0]


def _optimum(likelihoods: Array, optima: Array) -> tuple[Array, Array, Array]:
    """Return an arm's log evidence and the mean and standard deviation of its optimum, given the
    shared shape: each (shapes,).

    The arm's own shape and the optimum are integrated out. The moments of the optimum are taken
    about the middle of the grid, which keeps the subtraction of large squares exact enough.
    """
    top = likelihoods.max()
    middle = optima.mean()
    # The smallest float keeps every logarithm below finite.
    likelihood = np.exp(likelihoods - top) + np.finfo(np.float64).tiny
    u = optima - middle
    moments = likelihood @ np.stack([u**0, u, u**2], axis=1)
    total, first, second = (own_given_shared() @ moments.reshape(-1, 3)).T
    mean = first / total
    # A grid cannot show a standard deviation below a fraction of its spacing.
    variance = np.maximum(second / total - mean**2, (GRID / 4) ** 2)
    return np.log(total / len(optima)) + top, mean + middle, np.sqrt(variance)


@cache
def own_given_shared() -> Array:
    """Return the probability of each shape as a rank's own, given the shared shape: (shapes,
    shapes), where rows sum to 1. It is a product over the four axes of the grid.
    """
    axes = np.log(NOISE), np.log(SHOULDERS), STEEPNESS, np.log(CURVATURE)
    kernel = np.ones((1, 1))
    for values, sd in zip(axes, OF_RANK_SDS, strict=True):
        weights = np.exp(-0.5 * ((values[:, None] - values[None, :]) / sd) ** 2)
        kernel = np.kron(kernel, weights / weights.sum(axis=1, keepdims=True))
    return kernel
