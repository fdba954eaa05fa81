"""This module computes the best learning rate of a search that had only four trials,
all at the same rank. The module fits a parabola to the losses, adds no safety margin,
and limits the width of the 90 % interval.

Larger searches use a Bayesian fit that combines the losses at several LoRA ranks and
seeds. With only four trials, this Bayesian fit would pull the best learning rate
towards the middle of the learning rates that were tried. The fitted learning rate would
be too low whenever the best learning rate is higher than the learning rate of the first
trial. The 90 % interval of the Bayesian fit would hardly be narrower than the interval
before any trial. The benchmark benchmarks/calibration/search_rules.py compares a
parabola with the Bayesian fit, and results/search.md shows its results.
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
    """Return whether a search has so few trials that a parabola, instead of the
    Bayesian fit, determines the best learning rate.

    The Bayesian fit is always used if trials are scored by rewards, or are much shorter
    than the run that the user plans. A parabola was never tested on much shorter
    trials, and rewards are too noisy for a parabola.
    """
    return (
        len(options.ranks) == 1
        and options.searches <= FEW_TRIALS
        and not options.full_trials
        and not options.noisy
        and options.octaves_to_target < FAR
    )


def read_few(fit: Fit, rank: int | None, evidence: Sequence[Observation]) -> Fit:
    """Move the best learning rate of a fit with few trials to the vertex of a parabola.

    The parabola passes through the trial with the lowest score and the two trials at
    the nearest learning rates below and above it. If there is no such trial on one
    side, or if it diverged, the best learning rate of the fit is left unchanged. The
    returned fit has a steepness of zero, so the recipe does not lower its learning rate
    by a safety margin.

    Args:
        fit: the usual fit.
        rank: the rank that was tried.
        evidence: the results of the trials.
    """
    # Several trials may have the same learning rate, with different seeds: use their mean.
    values: dict[float, list[float]] = {}
    for seen in evidence:
        values.setdefault(seen.x, []).append(seen.value)
    vertex = vertex_of({x: fmean(each) for x, each in values.items()})
    # Only the first of the three fitted parameters is changed. With one rank, the drift with
    # rank and the distance to full finetuning keep their priors.
    shift = 0.0 if vertex is None else vertex - fit.best(rank)
    return replace(fit, mean=fit.mean + np.array([shift, 0.0, 0.0]), steepness=0.0)


def vertex_of(values: Mapping[float, float]) -> float | None:
    """Return the x of the vertex of the parabola through the point with the lowest
    value and its two neighbours.

    Return None if the point with the lowest value does not have two neighbours with
    finite values.

    Args:
        values: a mapping from log2 of the learning rate to the trial's value.

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
    # Newton's form of the parabola, from its slopes between x0, x1 and x2. The vertex is
    # where the slope is zero. The points need not be equally spaced. Since x1 is the first of the
    # lowest values, left is negative and right is not, so their difference is never zero.
    left = (values[x1] - values[x0]) / (x1 - x0)
    right = (values[x2] - values[x1]) / (x2 - x1)
    return (x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)


def capped(fit: Fit) -> Fit:
    """Limit the 90 % interval of a fit to at most `CAP` octaves on each side of the
    best learning rate.
    """
    # A recipe adds the scatter between runs to the fit's variance, so subtract it here. The
    # covariance is scaled on both sides, which leaves its correlations unchanged.
    most = (CAP / Z90) ** 2 - fit.prior.scatter**2
    if fit.covariance[0, 0] <= most:
        return fit
    shrink = np.diag([math.sqrt(most / fit.covariance[0, 0]), 1.0, 1.0])
    return replace(fit, covariance=shrink @ fit.covariance @ shrink)
