"""This module fits the loss of each rank as a function of the learning rate, with a 90 % interval.

The loss model in `_loss_model` describes the loss as a curve with a single minimum. A
few trials are not enough to determine this curve exactly, so the fit assigns a
probability to each possible curve. A `LossCurve` contains 1,000 curves that were
sampled according to their probabilities. The loss at a learning rate is estimated by
evaluating all sampled curves. The 90 % interval of the loss contains the losses of 90 %
of the sampled curves.

The estimates of the loss were tested with the trials of 65 ranks in this project's recipes. In each
test, the trial at the lowest learning rate was left out, and its loss was estimated from the other
trials, whose learning rates were 0.5 to 2 octaves away. The mean error of the estimates was 4 % of
the gain (the improvement of the best run), and 97 % of the 90 % intervals contained the true loss.
Above the highest learning rate tried, training may suddenly diverge, and only 78 % of the intervals
contained the true loss. `LossCurve.lost_at` therefore gives no estimate above this learning rate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ._constants import (
    BELOW_BEST,
    BEYOND,
    CURVATURE,
    GOOD,
    KNOWN,
    MOST_MISSED,
    NOISE,
    SHOULDERS,
    SMOOTH,
    STEEPNESS,
)
from ._loss_model import (
    LOG_PRIOR,
    Arm,
    Arms,
    Array,
    bowl_gap,
    error_of_shape,
    evidence_of,
    gaps_of,
    log_likelihood,
    optima_of,
    own_given_shared,
    plateaus_of,
    smooth_noise,
)
from ._observations import Observation, arms_of, best_fall, diverged, gain_of

_DRAWS = 1000
_ENDS = (0.05, 0.95)  # the quantiles at the two ends of a 90 % interval


@dataclass(frozen=True)
class LossCurve:
    """The fitted loss of one LoRA rank, or of full finetuning, as a function of the learning rate.

    All fields that are not listed below are arrays with one entry per sampled curve, of shape
    (draws,). These fields contain the parameters of the sampled curves: `levels` (the loss at the
    optimum), `optima` (x), `shoulders`, `steepness`, `curvature` and `plateaus`. The docstring of
    the module `_loss_model` explains these parameters. The losses in the arrays are measured from
    `lowest`, in units of `gain`.

    Args:
        lowest: the lowest score of the rank.
        gain: the improvement of the best run, in the unit of the scores.
        tried: x of the lowest and of the highest learning rate tried.
        miss: the largest error of the curve at a good trial, in units of the gain.
    """

    lowest: float
    gain: float
    tried: tuple[float, float]
    miss: float
    levels: Array
    optima: Array
    shoulders: Array
    steepness: Array
    curvature: Array
    plateaus: Array

    def losses(self, x: Array) -> tuple[Array, Array, Array]:
        """Return the median of the fitted loss and both ends of its 90 % interval for every x.

        x: an array with log2 of learning rates.
        """
        draws = self.levels[:, None] + self._gaps(x)
        low, middle, high = np.quantile(draws, (_ENDS[0], 0.5, _ENDS[1]), axis=0)
        unit = self.gain
        return (
            self.lowest + unit * middle,
            self.lowest + unit * low,
            self.lowest + unit * high,
        )

    def lost_at(self, x: float) -> float | None:
        """Return the expected fraction of the possible improvement that would be lost at x.

        At the learning rate with the lowest expected loss, the lost fraction of the improvement is
        0. Return None if x is far from the learning rates tried, if the sampled curves differ too
        much at x, or if the curve does not fit the trials well.

        x: log2 of the learning rate.
        """
        low, high = self.tried
        if self.miss > MOST_MISSED or not low - BEYOND <= x <= high:
            return None
        gaps = self._gaps(np.array([x]))[:, 0]
        bottom, top = np.quantile(gaps, _ENDS)
        if top - bottom > KNOWN:
            return None
        grid = np.linspace(low - BEYOND, high + BEYOND, 200)
        # The optimum is uncertain, so even the best x has an expected loss above zero.
        least = self._gaps(grid).mean(axis=0).min()
        return float(max(0.0, gaps.mean() - least))

    def _gaps(self, x: Array) -> Array:
        """For each sampled loss curve, return how far the loss at each x is above its minimum.

        The result is an array of shape (draws, len(x)), in units of the gain.
        """
        u = x[None, :] - self.optima[:, None]
        h = self.shoulders[:, None]
        a = self.steepness[:, None]
        k = self.curvature[:, None]
        return bowl_gap(u, h, a, k, self.plateaus[:, None])


@np.errstate(all="ignore")
def curves_of(observations: Sequence[Observation]) -> dict[int | None, LossCurve]:
    """Fit a loss curve to the trials of each rank, and return a dictionary of the curves by rank.

    The curve of full finetuning has the key None. The dictionary is empty if all trials diverged.
    The observations may contain any learning rate that is proportional to the base learning rate,
    such as the learning rate of the A matrices, because a constant factor only shifts the curve.
    """
    lost = diverged(observations)
    ended = [o for o in observations if o not in lost]
    if not ended:
        return {}
    gain = gain_of(ended)
    # Trials that diverged come last, in the same order as in `fit_observations`, so that the curves
    # agree with the fit.
    arms = arms_of(sorted(observations, key=lost.__contains__), lost, gain)
    lowest = _lowest_scores(ended)
    priors = _own_shape_priors(arms)
    curves = {}
    for rank, arm in arms.items():
        if rank in lowest:
            curves[rank] = _curve_of(arm, priors[rank], lowest[rank], gain)
    return curves


def improvement_is_known(observations: Sequence[Observation]) -> bool:
    """Return whether the trials show how far training improved the loss.

    This is the case if the losses decreased during training and the scores can be compared with the
    losses.
    """
    ended = [o for o in observations if o not in diverged(observations)]
    return bool(ended) and 0.0 < best_fall(ended) == gain_of(ended)


def _lowest_scores(ended: Collection[Observation]) -> dict[int | None, float]:
    """Return the lowest score of every rank. Ranks are left out if all of their trials diverged."""
    lowest: dict[int | None, float] = {}
    for o in ended:
        lowest[o.rank] = min(o.value, lowest.get(o.rank, o.value))
    return lowest


def _own_shape_priors(arms: Arms) -> Mapping[int | None, Array]:
    """For each rank, return the log prior over the shapes of its loss curve. The prior is estimated
    from the trials of all other ranks.

    The function assumes that the loss curves of all ranks have about the same shape, which it
    estimates from the other ranks. The curve of a single rank may differ from this shared shape by
    about `OF_RANK_SDS`.
    """
    evidence = {}
    for rank, arm in arms.items():
        by_plateau = [
            evidence_of(log_likelihood(arm, optima_of(arms), plateau))
            for plateau in plateaus_of(arm)
        ]
        evidence[rank] = np.logaddexp.reduce(by_plateau, axis=0)
    # Leave out the rank's own evidence, because `_curve_of` adds its likelihood. It would otherwise
    # be counted twice.
    total = np.sum([LOG_PRIOR, *evidence.values()], axis=0)
    priors = {}
    for rank in arms:
        of_others = total - evidence[rank]
        shared = np.exp(of_others - of_others.max())
        priors[rank] = np.log(shared @ own_given_shared() + np.finfo(np.float64).tiny)
    return priors


def _curve_of(arm: Arm, log_prior: Array, lowest: float, gain: float) -> LossCurve:
    """Compute the posterior of a rank's curve on a grid, and sample curves from it."""
    optima = optima_of({None: arm})
    plateaus = plateaus_of(arm)
    shapes = np.meshgrid(NOISE, SHOULDERS, STEEPNESS, CURVATURE, indexing="ij")
    _, shoulders, steepness, curvature = (each.ravel() for each in shapes)
    weights, errors = _weights_of_level(arm)
    logs = []
    levels = []
    for height in plateaus:
        likelihood = log_likelihood(arm, optima, height).reshape(len(log_prior), -1)
        gaps = gaps_of(arm.x[None, :] - optima[:, None], height)
        level = arm.y @ weights - gaps @ weights  # (h, a, k, optima, σ)
        level = np.moveaxis(level, -1, 0).reshape(likelihood.shape)
        # The minimum of the curve is unlikely to be far below the best trial. Without this prior, a
        # few trials could be explained by a narrow and deep minimum between two of them.
        below = np.minimum(level, 0.0) / BELOW_BEST
        logs.append(likelihood + log_prior[:, None] - 0.5 * below**2)
        levels.append(level)
    log_posterior = np.stack(logs)  # (plateaus, shapes, optima)
    drawn = _drawn(log_posterior.ravel())
    plateau, shape, optimum = np.unravel_index(drawn, log_posterior.shape)
    sigma = shape // (len(log_prior) // len(NOISE))
    # A separate generator with a fixed seed gives the same curve every time, and leaves the user's
    # random state unchanged.
    generator = np.random.default_rng(0)
    error = errors[sigma] * generator.standard_normal(len(drawn))
    curve = LossCurve(
        lowest=lowest,
        gain=gain,
        tried=(float(arm.x.min()), float(arm.x.max())),
        miss=0.0,
        levels=np.stack(levels).ravel()[drawn] + error,
        optima=optima[optimum],
        shoulders=shoulders[shape],
        steepness=steepness[shape],
        curvature=curvature[shape],
        plateaus=np.array(plateaus)[plateau],
    )
    # Check the curve against the good trials. `lost_at` gives no estimates if it misses them.
    good = arm.y < GOOD
    fitted = (curve.losses(arm.x[good])[0] - lowest) / gain
    return replace(curve, miss=float(np.abs(fitted - arm.y[good]).max()))


def _drawn(log_weights: Array) -> npt.NDArray[np.intp]:
    """Select `_DRAWS` indices in proportion to their weights.

    Instead of random numbers, the function uses equal steps through the cumulative weights. The
    selected indices are therefore always the same, and represent the weights more accurately than
    random samples.
    """
    cumulated = np.cumsum(np.exp(log_weights - log_weights.max()))
    steps = (np.arange(_DRAWS) + 0.5) / _DRAWS * cumulated[-1]
    return np.asarray(np.searchsorted(cumulated, steps), dtype=np.intp)


def _weights_of_level(arm: Arm) -> tuple[Array, Array]:
    """Return how much each trial contributes to the estimated level of a curve, and the error of
    the level.

    The level of a curve is its loss at the best learning rate. The estimated level of a loss curve
    is the mean of the residuals of its trials, weighted by the inverse covariance of the noise. The
    covariance of the noise does not include the noise that all runs with the same seed share. The
    curve therefore passes through the trials, and the curve's 90 % interval does not include the
    differences between seeds.

    Returns:
        Weights of shape (trials, σ), and standard deviations of shape (σ,).
    """
    smooth = SMOOTH * smooth_noise(arm) + (1.0 - SMOOTH) * np.eye(len(arm.x))
    weights = []
    errors = []
    for sigma in NOISE:
        precision = np.linalg.inv(sigma**2 * smooth + error_of_shape(arm))
        weights.append(precision.sum(axis=0) / precision.sum())
        errors.append(1.0 / np.sqrt(precision.sum()))
    return np.stack(weights, axis=1), np.array(errors)
