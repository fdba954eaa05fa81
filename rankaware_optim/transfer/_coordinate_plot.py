"""The figure of a coordinate check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from .._figures import COLOURS, figure_of, save, short
from ._coordinate_check import CoordinateCheck, CoordinateRow

# Field, label and marker.
_SIZES = (
    ("from_b", "s·ΔB·A₀·x", "o"),
    ("from_a", "s·B₀·ΔA·x", "s"),
    ("from_both", "s·ΔB·ΔA·x", "^"),
    ("inner", "inner features A·x", "D"),
)
_MOST_PANELS = 4


def plot_coordinates(check: CoordinateCheck, path: str | Path) -> Path:
    """Draw a coordinate check: sizes (rms) against rank, one panel per layer. The flat line is the
    wanted result.

    Of more than four layers, those with the steepest change are drawn. The legend says which terms
    are zero at every rank.

    Args:
        check: the result of `coordinate_check`.
        path: the file, a .png, .svg or .pdf.

    Returns:
        The path written.

    Raises:
        PlotError: matplotlib is not installed, or the file cannot be written.
    """
    worst = sorted(check.slopes, key=lambda pair: -abs(pair[1]))[:_MOST_PANELS]
    drawn = [pair for pair in check.slopes if pair in worst]
    width = max(7.0, 3.8 * len(drawn))
    figure, axes = figure_of(len(drawn), width, height=5.0, sharey=True)
    for axis, (layer, slope) in zip(axes, drawn, strict=True):
        _draw_sizes(
            axis,
            sorted((row for row in check.rows if row.layer == layer), key=lambda row: row.rank),
        )
        axis.set_title(f"{short(layer)}: r^{slope:+.2f}", fontsize=10, parse_math=False)
    axes[0].set_ylabel("rms per entry")
    figure.suptitle(fill(check.sentence, int(13 * width)), fontsize=10, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3 if width < 11 else 6,
        frameon=False,
        fontsize=9,
    )
    return save(figure, path)


def _draw_sizes(axis: Any, rows: Sequence[CoordinateRow]) -> None:
    ranks = [row.rank for row in rows]
    for (field, label, marker), colour in zip(_SIZES, COLOURS[1:], strict=False):
        sizes = [getattr(row, field) for row in rows]
        shown = (ranks, sizes) if any(sizes) else ((), ())
        axis.plot(
            *shown,
            marker=marker,
            color=colour,
            linewidth=1,
            label=label if any(sizes) else f"{label}: zero",
        )
    axis.plot(
        ranks,
        [row.change for row in rows],
        "o-",
        color=COLOURS[0],
        linewidth=2.5,
        label="whole change",
    )
    axis.axhline(
        rows[0].change, color="0.5", linestyle="--", linewidth=1, zorder=0, label="flat, as wanted"
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}")
    axis.set_xlabel("rank")
