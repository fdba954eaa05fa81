"""The best rate in a grid of runs at one rank, and its slope over ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from study.grids import lowest
from study.loss_curves import vertex_of


def best_rate(means: Mapping[float, float], start: float) -> float | None:
    """log2 of a curve's best rate: the parabola's vertex; None at an edge of the grid.

    At a cliff a parabola says nothing. There it is the rate with the lowest loss.

    Args:
        means: mean loss by log2 rate.
        start: the loss before training.
    """
    vertex, xs = vertex_of(means), sorted(means)
    if vertex is None:
        return None
    i = xs.index(lowest(means))
    untrained = max(means[xs[i - 1]], means[xs[i + 1]]) >= start
    return xs[i] if untrained or jumps([means[x] for x in xs[i:]]) else vertex


def jumps(upward: Sequence[float]) -> bool:
    """Whether the loss jumps above its lowest point: in one octave it rises to about where it then stays.

    That is, the next rate loses more than half of what any higher one loses. On a parabola it loses a third at most, if
    the vertex is half an octave below the lowest point.

    Args:
        upward: losses by rising rate, from the lowest loss on.
    """
    risen = [loss - upward[0] for loss in upward[1:] if math.isfinite(loss)]
    return len(risen) > 1 and risen[0] > max(risen) / 2


def slope(octaves: Mapping[int, float]) -> float:
    """Slope of octaves (log2 rate, by rank) over log2 rank."""
    return statistics.linear_regression(
        [math.log2(rank) for rank in octaves], list(octaves.values())
    ).slope
