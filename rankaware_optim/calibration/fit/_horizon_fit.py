"""What curves show of the horizon: the best rate at several lengths of training, and a line through them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt

from ...recipe import SLOPE_SD, TAIL, Horizon, Observation, recent
from ._posterior import Prior, fit_observations

_WITHIN_RUN = 0.3  # octaves per octave by which a slope read inside runs may miss that of whole, shorter runs
_SHARES = (1, 2, 4)  # curves are read at their end, half and quarter
_WINDOW = 5  # a reading is the mean of the last fifth of the values so far


def horizon_of(trials: Mapping[str, npt.NDArray[Any]], prior: Prior) -> Horizon:
    """The slope that a calibration's curves show, shrunk towards 0.

    The fit is made at the end, half and quarter of the curves, each read as the mean of the last fifth of its values so
    far, and a line laid through the three best rates. Under a schedule that decays, the middle of a run is not the end
    of a shorter one: its rate has not come down, so a lower one looks best there and the slope comes out too high.
    That is not corrected; the slope counts as uncertain by another 0.3 octaves per octave, so it moves the answer
    by half at most. Without curves, or with fewer than 20 steps, the prior is returned: 0 ± 0.3.

    trials: `Recipe.tensors`. prior: the fit's.
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
    """Every run as if it had ended after `end` steps; without those stopped before, unless they diverged."""
    rows = zip(*(trials[key].tolist() for key in ("rank", "seed", "lr", "diverged", "curve")), strict=True)
    for rank, seed, lr, diverged, curve in rows:
        value = recent(curve[:end], max(TAIL, end // _WINDOW))
        lost = diverged and not math.isfinite(value)
        if lost or math.isfinite(value):
            score = math.inf if lost else value
            yield Observation(rank or None, seed, math.log2(lr), score, curve[0], score, stopped=lost)
