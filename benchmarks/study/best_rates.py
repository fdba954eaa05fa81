"""The best rate in a grid of runs at one rank, and its slope over ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recording import number
from study.grids import Cell, Losses, curve, curves_by_seed, losses_at, lowest

from rankaware_optim.sweeps._bench import vertex_of


def best_of(done: Losses, cell: Cell, seeds: int, start: float) -> dict[str, Any] | None:
    """A cell's best rate; None if fewer than three rates are complete.

    `start` is the loss before training. Keys of the result:
        best: log2 of the best rate, the vertex of the parabola through the lowest mean loss and its neighbours; None
            at an edge of the grid.
        by_seed: the same for each seed.
        lowest: log2 of the grid's best rate.
        loss, spread: mean and standard deviation of the loss there. The spread is None for one seed.
        octave_above: what the next octave loses, as a share of the gain from `start`; None if it diverged.
    """
    means = curve(done, cell, seeds)
    if len(means) < 3:
        return None
    x = lowest(means)
    above = (means.get(x + 1, math.inf) - means[x]) / (start - means[x])
    return {
        "best": vertex_of(means),
        "by_seed": [vertex_of(each) for each in curves_by_seed(done, cell, seeds)],
        "lowest": x,
        "loss": means[x],
        "spread": statistics.stdev(losses_at(done, cell, x, seeds)) if seeds > 1 and math.isfinite(means[x]) else None,
        "octave_above": above if math.isfinite(above) else None,
    }


def in_words(row: Mapping[str, Any]) -> str:
    """A best rate and the rates of its seeds in words: "−7.9 (−8.0, −7.8, −7.9)"."""
    return f"{number(row['best'], 2)} ({', '.join(number(x, 1) for x in row['by_seed'])})"


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
    return statistics.linear_regression([math.log2(rank) for rank in octaves], list(octaves.values())).slope
