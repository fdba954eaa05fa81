"""Regret between the rates that were tried: the one estimator of all pages, a monotone spline through the runs.

`estimators.py` compares it with others on runs that were left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

DIVERGED = 5.0  # what a diverged run loses, a share of the gain; a larger loss counts as much


def regret_between(regrets: Mapping[float, float], x: float) -> float:
    """Regret at 2^x by `between`; at most `DIVERGED`, which a diverged run counts as.

    Args:
        regrets: regret by log2 of the rates tried, as a share of the gain; infinite if a run diverged.
        x: log2 of a rate.
    """
    return between({at: min(regret, DIVERGED) for at, regret in regrets.items()}, x)


def between(values: Mapping[float, float], x: float) -> float:
    """The value at x by Fritsch and Butland's monotone cubic (scipy's PCHIP). Beyond the points it is the last one's.

    The curve goes through every point, and between two points it neither rises above both nor falls below both.
    """
    xs = sorted(values)
    ys = [values[at] for at in xs]
    if x <= xs[0] or x >= xs[-1]:
        return ys[0] if x <= xs[0] else ys[-1]
    i = next(i for i in range(len(xs)) if xs[i + 1] >= x)
    slopes = slopes_of(xs, ys)
    step = xs[i + 1] - xs[i]
    t = (x - xs[i]) / step
    bend = t * (1 - t) ** 2 * slopes[i] - t**2 * (1 - t) * slopes[i + 1]
    return ys[i] + (ys[i + 1] - ys[i]) * t**2 * (3 - 2 * t) + step * bend


def slopes_of(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """The curve's slope at every point: 0 at a low or high point, else the weighted harmonic mean of both sides."""
    steps = [b - a for a, b in pairwise(xs)]
    chords = [(b - a) / step for (a, b), step in zip(pairwise(ys), steps, strict=True)]
    if len(chords) == 1:
        return chords * 2
    inner = [inner_slope(*both, *chord) for both, chord in zip(pairwise(steps), pairwise(chords), strict=True)]
    first = end_slope(steps[0], steps[1], chords[0], chords[1])
    last = end_slope(steps[-1], steps[-2], chords[-1], chords[-2])
    return [first, *inner, last]


def inner_slope(before: float, after: float, left: float, right: float) -> float:
    if left * right <= 0.0:
        return 0.0
    a, b = before + 2 * after, 2 * before + after
    return 3 * (before + after) / (a / left + b / right)


def end_slope(near: float, far: float, chord: float, next_chord: float) -> float:
    """The slope of the parabola through the last three points, as far as the curve stays monotone."""
    slope = ((2 * near + far) * chord - near * next_chord) / (near + far)
    if slope * chord <= 0.0:
        return 0.0
    if chord * next_chord < 0.0 and abs(slope) > 3 * abs(chord):
        return 3 * chord
    return slope
