"""A curve of losses over log2 rates: its value between two rates, and its lowest point."""

from __future__ import annotations

import math
from collections.abc import Mapping


def loss_between(losses: Mapping[float, float], x: float) -> float:
    """Return the loss at log2 rate x by linear interpolation between the two nearest rates."""
    low, high = max(at for at in losses if at <= x), min(at for at in losses if at >= x)
    share = 0.0 if low == high else (x - low) / (high - low)
    return losses[low] if share == 0.0 else (1.0 - share) * losses[low] + share * losses[high]


def vertex_of(curve: Mapping[float, float]) -> float | None:
    """Return the minimum of the parabola through the lowest point and its neighbours; None at an end of the grid.

    If the upper neighbour is infinite (a run diverged), the minimum is half a step below the lowest point.
    """
    xs = sorted(curve)
    i = min(range(len(xs)), key=lambda j: curve[xs[j]])
    if not 0 < i < len(xs) - 1 or not math.isfinite(curve[xs[i - 1]]):
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((x, curve[x]) for x in xs[i - 1 : i + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return x1 if left == right else (x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)
