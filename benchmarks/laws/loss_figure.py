"""Figure of a sweep: loss against rate, with a panel per scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.grids import Cell, Losses, curve, losses_at

from rankaware_optim._figures import COLOURS

Panel = tuple[str, Mapping[int, Cell]]  # title, cells by rank


def draw(done: Losses, panels: Sequence[Panel], seeds: int, start: float, columns: int, label: str, path: Path) -> None:
    """Draw loss against log2 rate, a panel per scheme and a line per rank: mean over seeds in a band of their range."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, cells) in zip(axes, panels, strict=False):
        _draw_panel(axis, done, cells, seeds, start)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"log2 {label}", fontsize=8)
    for axis in list(figure.axes)[len(panels) :]:
        axis.axis("off")
    figure.axes[0].set_ylabel("held-out loss", fontsize=8)
    figure.savefig(path, dpi=90)


def _draw_panel(axis: Any, done: Losses, cells: Mapping[int, Cell], seeds: int, start: float) -> None:
    bottom = start
    for colour, (rank, cell) in zip(COLOURS, cells.items(), strict=False):
        means = {x: loss for x, loss in curve(done, cell, seeds).items() if math.isfinite(loss)}
        if not means:
            continue
        ends = [losses_at(done, cell, x, seeds) for x in means]
        axis.plot(list(means), list(means.values()), marker="o", markersize=3, color=colour, label=f"rank {rank}")
        axis.fill_between(list(means), [min(e) for e in ends], [max(e) for e in ends], color=colour, alpha=0.2)
        bottom = min(bottom, *means.values())
    axis.set_ylim(bottom - 0.08 * (start - bottom), start)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
