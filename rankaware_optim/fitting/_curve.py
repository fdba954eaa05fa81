"""The fitted curve of one rank: its loss against the learning rate, with a 90 % interval.

A fit gives each rank a posterior over bowls: a shape (σ, h, a, k), an optimum v and a plateau. A
curve keeps `_DRAWS` bowls, drawn in proportion to their probability, and evaluates all of them
wherever it is asked. So an interval needs no formula: 90 % of the bowls lie in it.

How good it is: from 65 ranks of the study's recipes the trial at the lowest learning rate was left
out, and its loss was estimated from the other trials, 0.5 to 2 octaves away. The estimates were off
by 4 % of the gain on average, and 97 % of the 90 % intervals contained the truth. Above the highest
learning rate tried, where a cliff may come, only 78 % did, so there a curve gives no estimate.
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
_ENDS = (0.05, 0.95)  # quantiles at the ends of a 90 % interval


@dataclass(frozen=True)
class LossCurve:
    """The fitted loss of one rank, or of full finetuning.

    The bowls are arrays of shape (draws,): `levels` (the loss at the optimum), `optima` (x),
    `shoulders`, `steepness`, `curvature` and `plateaus`, see `_loss_model`. Their unit of loss is
    `gain`, and their zero is `lowest`.

    Args:
        lowest: the lowest score of the rank.
        gain: the improvement of the best run, in the unit of the scores.
        tried: x of the lowest and of the highest learning rate tried.
        miss: how far the curve is from a good trial at most, in units of the gain.
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
        """Return the median of the loss, and the ends of its 90 % interval, at every x."""
        draws = self.levels[:, None] + self._gaps(x)
        low, middle, high = np.quantile(draws, (_ENDS[0], 0.5, _ENDS[1]), axis=0)
        unit = self.gain
        return (
            self.lowest + unit * middle,
            self.lowest + unit * low,
            self.lowest + unit * high,
        )

    def lost_at(self, x: float) -> float | None:
        """Return the expected share of the possible improvement that is lost at x. None where the
        curve cannot tell: far from the learning rates tried, or if its bowls disagree there, or if
        the curve misses the trials themselves, because their loss is no bowl.

        The best x has an expected loss too, because the optimum is uncertain. The share is counted
        from there.
        """
        low, high = self.tried
        if self.miss > MOST_MISSED or not low - BEYOND <= x <= high:
            return None
        gaps = self._gaps(np.array([x]))[:, 0]
        bottom, top = np.quantile(gaps, _ENDS)
        if top - bottom > KNOWN:
            return None
        grid = np.linspace(low - BEYOND, high + BEYOND, 200)
        least = self._gaps(grid).mean(axis=0).min()
        return float(max(0.0, gaps.mean() - least))

    def _gaps(self, x: Array) -> Array:
        """Return the loss above the optimum's, (draws, len(x)), in units of the gain."""
        u = x[None, :] - self.optima[:, None]
        h = self.shoulders[:, None]
        a = self.steepness[:, None]
        k = self.curvature[:, None]
        return bowl_gap(u, h, a, k, self.plateaus[:, None])


@np.errstate(all="ignore")
def curves_of(observations: Sequence[Observation]) -> dict[int | None, LossCurve]:
    """Return the fitted curve of every rank, None for full finetuning. It is empty if no run stayed
    finite.

    The x of a rank may be log2 of any learning rate that is proportional to the base learning rate,
    such as the learning rate of its A matrices. The shapes are the same.
    """
    lost = diverged(observations)
    ended = [o for o in observations if o not in lost]
    if not ended:
        return {}
    gain = gain_of(ended)
    # The order of `fit_observations`, so that both fit the same arms.
    arms = arms_of(sorted(observations, key=lost.__contains__), lost, gain)
    lowest = _lowest_scores(ended)
    priors = _own_shape_priors(arms)
    curves = {}
    for rank, arm in arms.items():
        if rank in lowest:
            curves[rank] = _curve_of(arm, priors[rank], lowest[rank], gain)
    return curves


def improvement_is_known(observations: Sequence[Observation]) -> bool:
    """Return whether the gain is an improvement over the loss before training: the curves of losses
    fell, and the scores are comparable with them.
    """
    ended = [o for o in observations if o not in diverged(observations)]
    return bool(ended) and 0.0 < best_fall(ended) == gain_of(ended)


def _lowest_scores(ended: Collection[Observation]) -> dict[int | None, float]:
    lowest: dict[int | None, float] = {}
    for o in ended:
        lowest[o.rank] = min(o.value, lowest.get(o.rank, o.value))
    return lowest


def _own_shape_priors(arms: Arms) -> Mapping[int | None, Array]:
    """Return the log prior of each arm's own shape: how the other arms constrain the shared shape,
    and how far an arm's own shape may be from it.
    """
    evidence = {}
    for rank, arm in arms.items():
        by_plateau = [
            evidence_of(log_likelihood(arm, optima_of(arms), plateau))
            for plateau in plateaus_of(arm)
        ]
        evidence[rank] = np.logaddexp.reduce(by_plateau, axis=0)
    total = np.sum([LOG_PRIOR, *evidence.values()], axis=0)
    priors = {}
    for rank in arms:
        of_others = total - evidence[rank]
        shared = np.exp(of_others - of_others.max())
        priors[rank] = np.log(shared @ own_given_shared() + np.finfo(np.float64).tiny)
    return priors


def _curve_of(arm: Arm, log_prior: Array, lowest: float, gain: float) -> LossCurve:
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
        # Training is unlikely to reach a loss far below the best of the trials. Without this, few
        # trials are explained by a narrow dip between two of them.
        below = np.minimum(level, 0.0) / BELOW_BEST
        logs.append(likelihood + log_prior[:, None] - 0.5 * below**2)
        levels.append(level)
    log_posterior = np.stack(logs)  # (plateaus, shapes, optima)
    drawn = _drawn(log_posterior.ravel())
    plateau, shape, optimum = np.unravel_index(drawn, log_posterior.shape)
    sigma = shape // (len(log_prior) // len(NOISE))
    generator = np.random.default_rng(0)  # of this curve alone, and the same each time
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
    good = arm.y < GOOD
    fitted = (curve.losses(arm.x[good])[0] - lowest) / gain
    return replace(curve, miss=float(np.abs(fitted - arm.y[good]).max()))


def _drawn(log_weights: Array) -> npt.NDArray[np.intp]:
    """Return `_DRAWS` indices in proportion to the weights. Equal steps through the cumulated
    weights give the same ones every time, with less scatter than random draws.
    """
    cumulated = np.cumsum(np.exp(log_weights - log_weights.max()))
    steps = (np.arange(_DRAWS) + 0.5) / _DRAWS * cumulated[-1]
    return np.asarray(np.searchsorted(cumulated, steps), dtype=np.intp)


def _weights_of_level(arm: Arm) -> tuple[Array, Array]:
    """Return the weights of the trials in the level of a bowl, (trials, σ), and the standard
    deviation of that level, (σ,).

    The level is the mean of the residuals, weighted by the inverse covariance of the noise. The
    part of the noise that all runs of a seed share is left out here. So the curve passes through
    the runs that were made, and its interval does not include the spread between seeds.
    """
    smooth = SMOOTH * smooth_noise(arm) + (1.0 - SMOOTH) * np.eye(len(arm.x))
    weights = []
    errors = []
    for sigma in NOISE:
        precision = np.linalg.inv(sigma**2 * smooth + error_of_shape(arm))
        weights.append(precision.sum(axis=0) / precision.sum())
        errors.append(1.0 / np.sqrt(precision.sum()))
    return np.stack(weights, axis=1), np.array(errors)
