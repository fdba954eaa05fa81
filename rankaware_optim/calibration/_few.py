"""How the result of four trials at one rank is read: with a parabola, no margin, and a capped
interval.

The usual fit shares what it learns between ranks and seeds. Four trials at one rank have little to
share. Their fitted optimum is drawn towards the middle of the learning rates that were tried, so it
is too low if the best one lies above the first guess, and its interval is hardly narrower than the
prior's. The numbers are from benchmarks/calibration/search_rules.py (results/search.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from ..fitting import Fit, Observation
from ..recipe import Z90
from ._constants import CAP, FAR, FEW_TRIALS
from ._schedule import Options


def is_few(options: Options) -> bool:
    """Return whether the result of a search is read in this way.

    It was not measured for trials shorter than a quarter of the run, nor for rewards, which are
    noisier. So these are read by the usual fit.
    """
    return (
        len(options.ranks) == 1
        and options.searches <= FEW_TRIALS
        and not options.full_trials
        and not options.noisy
        and options.octaves_to_target < FAR
    )


def read_few(fit: Fit, rank: int | None, evidence: Sequence[Observation]) -> Fit:
    """Return the fit of few trials, moved to the vertex of a parabola and without a steepness.

    The parabola goes through the trial with the lowest score and its two neighbours. If a neighbour
    is missing or diverged, the fitted optimum stays. Without a steepness the recipe has no margin.

    Args:
        fit: the usual fit.
        rank: the rank that was tried.
        evidence: the trials.
    """
    values: dict[float, list[float]] = {}
    for seen in evidence:
        values.setdefault(seen.x, []).append(seen.value)
    vertex = vertex_of({x: fmean(each) for x, each in values.items()})
    shift = 0.0 if vertex is None else vertex - fit.best(rank)
    return replace(fit, mean=fit.mean + np.array([shift, 0.0, 0.0]), steepness=0.0)


def vertex_of(values: Mapping[float, float]) -> float | None:
    """Return the vertex of the parabola through the lowest value and its two neighbours, or None if
    a neighbour is missing or not finite.

    values: the values by log2 of the learning rate.

    >>> vertex_of({-10.0: 3.0, -9.0: 1.0, -8.0: 2.0})
    -8.833333333333334
    """
    xs = sorted(values)
    i = min(range(len(xs)), key=lambda j: values[xs[j]])
    if not 0 < i < len(xs) - 1:
        return None
    x0, x1, x2 = xs[i - 1 : i + 2]
    if not (math.isfinite(values[x0]) and math.isfinite(values[x2])):
        return None
    left = (values[x1] - values[x0]) / (x1 - x0)
    right = (values[x2] - values[x1]) / (x2 - x1)
    if left == right:
        return x1
    return (x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)


def capped(fit: Fit) -> Fit:
    """Return the fit with an interval of at most `CAP` octaves to either side of its optimum."""
    most = (CAP / Z90) ** 2 - fit.prior.scatter**2
    if fit.covariance[0, 0] <= most:
        return fit
    shrink = np.diag([math.sqrt(most / fit.covariance[0, 0]), 1.0, 1.0])
    return replace(fit, covariance=shrink @ fit.covariance @ shrink)
