"""Model of a rank's loss against x = log2 of the rate: a bowl of unknown shape and noise. Its
minimum is estimated.

Around its optimum v the loss, in units of the gain, is

    loss(x) = level + min(k·above(u), p)    for u = x − v ≥ 0
    loss(x) = level + min(k·below(u), 1)    for u < 0

    above(u) = (exp(a·u) − a·u − 1)/a², u²/2 for a = 0
    below(u) = h²·(√(1 + (u/h)²) − 1)

p is the plateau at rates that are too high. It is 1 (no better than untrained), or the largest gap
among the rank's runs if all of them learn the easy part and stall. Both values are kept and
weighted, as the shapes are.

k is the curvature at v (per octave²). a is the steepness of the cliff above v (per octave). h is
the distance below v at which the parabola becomes a straight line (octaves).

The noise has four parts. One is a level common to all runs of a seed. A smooth part and a white
part have standard deviation σ together. The last is the error of the shape itself, a share of the
gap to the best.

The posterior is over a grid of shapes (σ, h, a, k), weighted by prior and evidence. Ranks nearly
share a shape: each has its own, within `OF_RANK_SDS` of the shared one.
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
    """The trials of one rank, or of full finetuning, arrays of shape (trials,).

    x: log2 of the rate. y: gap to the rank's best score, in units of the gain, at most
    `UNTRAINED_GAP`.
    seeds: whole numbers.
    """

    x: Array
    y: Array
    seeds: npt.NDArray[np.int64]


class Bowls(NamedTuple):
    """The optimum of every arm under every shape on the grid, and the weight of the shape.

    log_weight: (shapes,), log of prior times evidence. mean, sd: of the optima, (shapes, arms),
    octaves. steepness: the shape's a, (shapes,).
    """

    log_weight: Array
    mean: Array
    sd: Array
    steepness: Array


Arms = Mapping[int | None, Arm]  # by rank, None for full finetuning


def bowls_of(arms: Arms) -> Bowls:
    """Fit a bowl to every arm. A run at too high a rate ends untrained, or on a plateau if no run
    was that bad.
    """
    choices = [_bowls_where(arms, [UNTRAINED_GAP] * len(arms))]
    highest = [float(arm.y.max()) for arm in arms.values()]
    if max(highest) < UNTRAINED_GAP:
        choices.append(_bowls_where(arms, [gap or UNTRAINED_GAP for gap in highest]))
    return Bowls(*map(np.concatenate, zip(*choices, strict=True)))


def plateaus_of(arm: Arm) -> list[float]:
    """Return the plateaus that a single arm may have: that of untrained runs, and the gap of its
    worst run if all of its runs are better than untrained.
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
    """Fit a bowl to every arm, whose runs at too high a rate end on these plateaus."""
    optima = optima_of(arms)
    fits = []
    for arm, plateau in zip(arms.values(), plateaus, strict=True):
        fits.append(_optimum(log_likelihood(arm, optima, plateau), optima))
    evidence, mean, sd = np.stack(fits, axis=-1)
    log_weight = LOG_PRIOR + evidence.sum(axis=1)
    return Bowls(log_weight, mean, sd, _STEEPNESS_OF_SHAPE)


def _gaps(u: Array, plateau: float) -> Array:
    """Return the loss above its minimum under every shape, at octaves u from the optimum: (h, a, k,
    *u.shape).
    """
    h = SHOULDERS.reshape(-1, 1, *[1] * u.ndim)
    a = STEEPNESS[1:].reshape(-1, *[1] * u.ndim)
    k = CURVATURE.reshape(-1, *[1] * u.ndim)
    below = h**2 * (np.sqrt(1.0 + (u / h) ** 2) - 1.0)
    cliffs = (np.exp(np.clip(a * u, 0.0, 20.0)) - a * u - 1.0) / a**2
    above = np.stack([u**2 / 2, *cliffs])
    bowls = np.where(u < 0, below, above)  # of curvature 1: (h, a, *u.shape)
    highest = np.where(u < 0, UNTRAINED_GAP, plateau)
    return np.asarray(np.minimum(k * bowls[:, :, None], highest))


def _covariances(arm: Arm) -> tuple[Array, Array]:
    """Return two covariances of the losses, (trials, trials): the noise in units of σ², and the
    error of the shape.
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

    The level has a flat prior and is integrated out. One basis diagonalizes both covariances for
    every σ at once.
    """
    gaps = _gaps(arm.x[None, :] - optima[:, None], plateau)
    noise, shape = _covariances(arm)
    whiten = np.linalg.inv(np.linalg.cholesky(noise))
    variances, basis = np.linalg.eigh(whiten @ shape @ whiten.T)
    basis = whiten.T @ basis
    precision = 1.0 / (NOISE**2 + np.maximum(variances, 0.0)[:, None])  # (trials, σ)
    ones = basis.sum(axis=0)[:, None]
    miss = arm.y @ basis - gaps @ basis
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
    """Return an arm's log evidence and its optimum's mean and sd, given the shared shape: each of
    shape (shapes,).
    """
    top = likelihoods.max()
    middle = optima.mean()
    # every logarithm below is finite
    likelihood = np.exp(likelihoods - top) + np.finfo(np.float64).tiny
    u = optima - middle
    moments = likelihood @ np.stack([u**0, u, u**2], axis=1)
    total, first, second = (own_given_shared() @ moments.reshape(-1, 3)).T
    mean = first / total
    variance = np.maximum(second / total - mean**2, (GRID / 4) ** 2)
    return np.log(total / len(optima)) + top, mean + middle, np.sqrt(variance)


@cache
def own_given_shared() -> Array:
    """Return the probability of each shape as a rank's own, given the shared shape: (shapes,
    shapes), rows sum to 1.
    """
    axes = np.log(NOISE), np.log(SHOULDERS), STEEPNESS, np.log(CURVATURE)
    kernel = np.ones((1, 1))
    for values, sd in zip(axes, OF_RANK_SDS, strict=True):
        weights = np.exp(-0.5 * ((values[:, None] - values[None, :]) / sd) ** 2)
        kernel = np.kron(kernel, weights / weights.sum(axis=1, keepdims=True))
    return kernel
