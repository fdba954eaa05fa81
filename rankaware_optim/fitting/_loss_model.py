"""This module models the loss of a rank as a function of the learning rate, with x = log2(lr).

The loss has a single minimum, like a bowl, but the exact shape of the bowl is unknown.
Losses are measured in units of the *gain*, which is the difference between the losses
of an untrained model and of the best run. In units of the gain, the best score is 0 and
the loss of an untrained model is 1. At u = x − v octaves from the optimum v, the model
is

    loss(x) = level + min(k·above(u), p)    for u ≥ 0
    loss(x) = level + min(k·below(u), 1)    for u < 0

    above(u) = (exp(a·u) − a·u − 1)/a²,  or u²/2 for a = 0
    below(u) = h²·(√(1 + (u/h)²) − 1)

Near the optimum, the loss at u octaves from the best learning rate is the parabola k·u²/2. At
higher learning rates, the loss may rise much more steeply, because training becomes unstable. At
lower learning rates, the loss rises more slowly, along a straight line.

    k    curvature at the optimum, per octave²
    a    steepness above the optimum, per octave. With a = 0 the curve stays a parabola
    h    octaves below the optimum at which the parabola becomes a straight line
    p    the largest loss at learning rates that are too high, which is 1 (untrained) or the loss
         of the worst run if all runs learned something. The fit tries both values and weights them
    σ    standard deviation of the noise, in units of the gain

The noise of a run is the sum of four terms:

* a shift that all runs with the same seed share
* noise that is correlated between similar learning rates
* noise that is independent for every run (it has the variance σ² together with the correlated one)
* the error of the model itself, which is a fraction of the distance from the best loss

The fit computes the posterior on a grid of shapes (σ, h, a, k) and optima v. The weight of a curve
shape is the product of its prior and its evidence, which measures how well the shape explains the
losses of the trials. The loss curves of different ranks have similar shapes. The model therefore
assumes that all ranks share a shape, and that the shape of a single rank differs from the shared
shape by about `OF_RANK_SDS`.
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
    """The trials of a LoRA rank, or of full finetuning, as arrays of shape (trials,).

    x: log2 of the learning rate.
    y: the score minus the rank's best score, in units of the gain, at most `UNTRAINED_GAP`.
    seeds: the random seeds of the trials, whole numbers.
    """

    x: Array
    y: Array
    seeds: npt.NDArray[np.int64]


class Bowls(NamedTuple):
    """The fitted optima of all ranks for each curve shape, and the weights of the shapes.

    log_weight: the log of prior times evidence of each shape, (shapes,).
    mean, sd: mean and standard deviation of the optima, (shapes, arms), octaves.
    steepness: the steepness a of each shape, (shapes,).
    """

    log_weight: Array
    mean: Array
    sd: Array
    steepness: Array


Arms = Mapping[int | None, Arm]  # the keys are ranks, and None means full finetuning


def bowls_of(arms: Arms) -> Bowls:
    """Fit the loss model to the trials of every rank.

    If the learning rate is much too high, the loss usually ends on a plateau, which is the loss of
    an untrained model. If all runs were better than an untrained model, the plateau may also be the
    loss of the worst run. If both losses are possible, the function fits the loss curves with each
    of the two plateaus and weights the results by their evidence.
    """
    choices = [_bowls_where(arms, [UNTRAINED_GAP] * len(arms))]
    highest = [float(arm.y.max()) for arm in arms.values()]
    if max(highest) < UNTRAINED_GAP:
        choices.append(_bowls_where(arms, [gap or UNTRAINED_GAP for gap in highest]))
    return Bowls(*map(np.concatenate, zip(*choices, strict=True)))


def plateaus_of(arm: Arm) -> list[float]:
    """Return the possible losses of a rank's runs when the learning rate is much too high.

    The first value is the loss of an untrained model. If all runs of the rank are better than an
    untrained model, the second value is the loss of the worst run.
    """
    highest = float(arm.y.max())
    if 0.0 < highest < UNTRAINED_GAP:
        return [UNTRAINED_GAP, highest]
    return [UNTRAINED_GAP]


def optima_of(arms: Arms) -> Array:
    """Return a grid of values that log2 of the best learning rate may have.

    The grid contains the range of learning rates that were tried, and `BEYOND` octaves on either
    side.
    """
    xs = np.concatenate([arm.x for arm in arms.values()])
    span = float(xs.max() - xs.min()) + 2 * BEYOND
    # Round before ceil, so that a tiny rounding error does not add another candidate.
    count = math.ceil(round(span / GRID, 6))
    return np.asarray(xs.min() - BEYOND + GRID * np.arange(count))


def _bowls_where(arms: Arms, plateaus: Sequence[float]) -> Bowls:
    """Fit the loss model to the trials of every rank, using the given plateau for each rank."""
    optima = optima_of(arms)
    fits = []
    for arm, plateau in zip(arms.values(), plateaus, strict=True):
        fits.append(_optimum(log_likelihood(arm, optima, plateau), optima))
    evidence, mean, sd = np.stack(fits, axis=-1)
    log_weight = LOG_PRIOR + evidence.sum(axis=1)
    return Bowls(log_weight, mean, sd, _STEEPNESS_OF_SHAPE)


def bowl_gap(u: Array, h: Array, a: Array, k: Array, plateau: Array | float) -> Array:
    """Return how far the loss at u octaves from the optimum is above the lowest loss.

    The equations of the loss model are in the docstring of this module. The arrays h,
    a, k and plateau are broadcast with u.
    """
    below = h**2 * (np.sqrt(1.0 + (u / h) ** 2) - 1.0)
    # np.where evaluates both branches, so a = 0 is replaced to avoid a division by zero, and the
    # exponent is limited to avoid an overflow.
    steepness = np.where(a == 0.0, 1.0, a)
    cliff = (np.exp(np.clip(a * u, 0.0, 20.0)) - a * u - 1.0) / steepness**2
    above = np.where(a == 0.0, u**2 / 2, cliff)
    curvature_one = np.where(u < 0, below, above)
    highest = np.where(u < 0, UNTRAINED_GAP, plateau)
    return np.asarray(np.minimum(k * curvature_one, highest))


def gaps_of(u: Array, plateau: float) -> Array:
    """For every shape of the loss curve, return how far the loss is above its minimum at u octaves
    from the optimum.

    The axes of the result are (h, a, k, *u.shape).
    """
    inner = [1] * u.ndim
    h = SHOULDERS.reshape(-1, 1, 1, *inner)
    a = STEEPNESS.reshape(-1, 1, *inner)
    k = CURVATURE.reshape(-1, *inner)
    return bowl_gap(u, h, a, k, plateau)


def _covariances(arm: Arm) -> tuple[Array, Array]:
    """Return two covariance matrices: the matrix of the noise, in units of σ², and the matrix of
    the model's error.

    Both covariance matrices have the shape (trials, trials).
    """
    white = np.eye(len(arm.x))
    paired = arm.seeds[:, None] == arm.seeds[None, :]
    smooth = SMOOTH * _alike(arm)
    noise = paired * (SEED_SD**2 + smooth) + (1.0 - SMOOTH) * white
    return noise, error_of_shape(arm)


def _alike(arm: Arm) -> Array:
    """Return the correlation matrix of errors that are similar at similar learning rates."""
    distance = arm.x[:, None] - arm.x[None, :]
    return np.asarray(np.exp(-0.5 * (distance / LENGTH) ** 2))


def smooth_noise(arm: Arm) -> Array:
    """Return the correlation matrix of the smooth noise that runs with the same seed share."""
    return np.asarray((arm.seeds[:, None] == arm.seeds[None, :]) * _alike(arm))


def error_of_shape(arm: Arm) -> Array:
    """Return the covariance matrix of the error of the model, which is larger for worse trials."""
    gap = SHAPE_ERROR * arm.y
    return np.outer(gap, gap) * (_alike(arm) + np.eye(len(arm.x))) / 2


def log_likelihood(arm: Arm, optima: Array, plateau: float) -> Array:
    """Return the log likelihood of a rank's losses for every shape and every optimum.

    The losses have a normal distribution with the mean level + gap and the covariance σ²·noise +
    shape, where level is the loss at the optimum. The function uses a basis in which the noise
    matrix is the identity and the shape matrix is diagonal. In this basis, the covariance of the
    losses is diagonal for every σ, so no matrix has to be inverted. The level has a flat prior and
    is integrated out: the function subtracts the effect of the best level from the misfit, and adds
    the log of the level's precision to the log determinant.

    Returns:
        log p(losses | shape, optimum) with the axes (σ, h, a, k, optima).
    """
    gaps = gaps_of(arm.x[None, :] - optima[:, None], plateau)
    noise, shape = _covariances(arm)
    whiten = np.linalg.inv(np.linalg.cholesky(noise))
    variances, basis = np.linalg.eigh(whiten @ shape @ whiten.T)
    basis = whiten.T @ basis
    precision = 1.0 / (NOISE**2 + np.maximum(variances, 0.0)[:, None])  # (trials, σ)
    ones = basis.sum(axis=0)[
        :, None
    ]  # a vector of ones in the new basis, for the level
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
    """Return the log evidence of a rank for each shared shape, as an array of shape (shapes,).

    likelihoods: the result of `log_likelihood`.
    """
    return _optimum(likelihoods, np.arange(float(likelihoods.shape[-1])))[0]


def _optimum(likelihoods: Array, optima: Array) -> tuple[Array, Array, Array]:
    """Return the log evidence of a rank, and the mean and standard deviation of its optimum.

    The three returned arrays have one entry for each curve shape that all ranks may share. The
    function integrates over the shape and the optimum of the rank.
    """
    top = likelihoods.max()
    # The variance is a difference of squares. Computing the moments around the middle of the grid
    # keeps the squares small, so that the difference is accurate.
    middle = optima.mean()
    # Adding the smallest positive float keeps the logarithm below finite.
    likelihood = np.exp(likelihoods - top) + np.finfo(np.float64).tiny
    u = optima - middle
    moments = likelihood @ np.stack([u**0, u, u**2], axis=1)
    total, first, second = (own_given_shared() @ moments.reshape(-1, 3)).T
    mean = first / total
    # A grid cannot resolve a standard deviation that is much smaller than its spacing.
    variance = np.maximum(second / total - mean**2, (GRID / 4) ** 2)
    return np.log(total / len(optima)) + top, mean + middle, np.sqrt(variance)


@cache
def own_given_shared() -> Array:
    """Return how probable each shape of the loss curve is at one rank, if the shape that all ranks
    share is known.

    The result has the shape (shapes, shapes). Each row of the result belongs to one possible shared
    shape, and the probabilities in a row sum to 1. Each probability is the product of four factors,
    one for each parameter of the shape.
    """
    axes = np.log(NOISE), np.log(SHOULDERS), STEEPNESS, np.log(CURVATURE)
    kernel = np.ones((1, 1))
    for values, sd in zip(axes, OF_RANK_SDS, strict=True):
        weights = np.exp(-0.5 * ((values[:, None] - values[None, :]) / sd) ** 2)
        kernel = np.kron(kernel, weights / weights.sum(axis=1, keepdims=True))
    return kernel
