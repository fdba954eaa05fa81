"""The slope of the best rate in the number of steps, estimated from the curves of trials of one length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt

from ...recipe import SLOPE_SD, TAIL, Horizon, Observation, noise_of, recent
from ._posterior import Prior, fit_observations

_WITHIN_RUN = 0.3  # standard deviation between a slope read inside runs and that of whole shorter runs
_SHARES = (1, 2, 4)  # curves are read at their end, half and quarter
_WINDOW = 5  # a reading is the mean of the last fifth of the values so far


def horizon_of(trials: Mapping[str, npt.NDArray[Any]], prior: Prior) -> Horizon:
    """Estimate the slope of the best rate in the number of steps from a calibration's curves, shrunk towards 0.

    The fit is repeated at the end, half and quarter of the curves. Each reading is the mean of the last fifth of the
    values so far. A line is drawn through the three best rates. With a decaying schedule the middle of a run differs
    from the end of a shorter run. Its rate is still high, so a lower one looks best there, and the slope is biased
    upwards. This is not corrected. The slope gets an additional standard deviation of 0.3 octaves per octave instead,
    so that it enters with a weight of at most one half.

    Args:
        trials: `Recipe.tensors`.
        prior: the fit's prior.

    Returns:
        The horizon. Without curves, or with fewer than 20 steps, it is the prior 0 ± 0.3.
    """
    if not {"rank", "seed", "lr", "diverged", "curve"} <= trials.keys():
        return Horizon()
    steps = trials["curve"].shape[1]
    at = [steps // share for share in _SHARES if steps // share >= TAIL]
    fits = [(end, fit_observations(list(_read(trials, end)), prior)) for end in at]
    points = [(math.log2(end / steps), fit.mean[0], fit.covariance[0, 0]) for end, fit in fits if fit is not None]
    if len(points) < 2:
        return Horizon()
    weights = [1.0 / variance for _, _, variance in points]
    middle = sum(w * x for w, (x, _, _) in zip(weights, points, strict=True)) / sum(weights)
    lever = sum(w * (x - middle) ** 2 for w, (x, _, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - middle) * y for w, (x, y, _) in zip(weights, points, strict=True)) / lever
    variance = 1.0 / lever + _WITHIN_RUN**2
    share = SLOPE_SD**2 / (SLOPE_SD**2 + variance)
    return Horizon(float(share * slope), math.sqrt(float(share * variance)))


def _read(trials: Mapping[str, npt.NDArray[Any]], end: int) -> Iterator[Observation]:
    """Yield every run as if it had ended after `end` steps. Runs stopped earlier are left out unless they diverged."""
    rows = zip(*(trials[key].tolist() for key in ("rank", "seed", "lr", "diverged", "curve")), strict=True)
    for rank, seed, lr, diverged, curve in rows:
        value = recent(curve[:end], max(TAIL, end // _WINDOW))
        lost = diverged and not math.isfinite(value)
        if lost or math.isfinite(value):
            score = math.inf if lost else value
            noise = noise_of(curve[:end])
            yield Observation(rank or None, seed, math.log2(lr), score, curve[0], score, stopped=lost, noise=noise)
