"""The picture of the frontier: one row for each way to a learning rate, with its price and what it loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from internals import COLOURS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

LOW, HIGH = 0.08, 700.0  # % of the possible improvement, the ends of the axis
GREY = "0.35"
# The ways that the picture shows, with names that need no table beside them. The table has all ways.
SHOWN = {
    "2e-4": "always 2e-4",
    "Tinker's formula": "Tinker's formula",
    "`suggest_lr`": "suggest_lr",
    "schedule-free AdamW": "schedule-free AdamW at its suggestion",
    "Prodigy": "Prodigy",
    "keeping it": "rank 16's best, unchanged",
    "a tenth in full finetuning": "rank 16's best / 10",
    "the default law": "rank 16's best, converted",
    "LR range test at the rank trained": "Lightning's LR range test",
    "the finder at 1/4": "calibrate(trainer): 4 trials of a quarter",
    "TPE at rank 16, the law": "TPE at rank 16, then converted",
    "a calibration: 16 trials at two ranks": "calibrate(train): 16 trials at two ranks",
    "16 trials of an eighth at ranks 4 and 64": "calibrate(train): 16 trials of an eighth",
    "TPE at every rank": "TPE at every rank",
}


class Point(NamedTuple):
    """A way: its name, price in runs, mean loss and its 95th percentile in %, whether it is ours and needs a rate."""

    name: str
    price: float
    mean: float
    high: float
    ours: bool
    has_rate: bool


class Evidence(NamedTuple):
    """A row of panels: its title, and the points of each column."""

    title: str
    columns: Mapping[str, Sequence[Point]]


def draw_frontier(rows: Sequence[Evidence]) -> Figure:
    """A row of panels for each evidence, a panel for each of its columns, a line for each way."""
    ways = [ways_of(of) for of in rows]
    count = len(rows[0].columns)
    figure = Figure(
        figsize=(11, 1.6 + 0.36 * sum(map(len, ways))), layout="constrained"
    )
    axes = figure.subplots(
        len(rows),
        count,
        sharex=True,
        squeeze=False,
        height_ratios=[len(names) for names in ways],
    )
    for of, names, panels in zip(rows, ways, axes, strict=True):
        for axis, (column, points) in zip(panels, of.columns.items(), strict=True):
            axis.set_title(f"{of.title},\n{column}", fontsize=11, loc="left")
            plot(axis, names, points)
        panels[0].set_yticks(range(len(names)), [names[name] for name in names])
        for axis in panels[1:]:
            axis.set_yticks(range(len(names)), [])
        for label in panels[0].get_yticklabels():
            label.set_fontsize(11)
    for axis in axes[-1]:
        axis.set_xlabel("possible improvement lost, %", fontsize=11)
    figure.legend(handles=marks(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def ways_of(of: Evidence) -> dict[str, str]:
    """The labels of the ways that have a point in some column, the cheapest first, by name."""
    points = [point for column in of.columns.values() for point in column]
    points = [point for point in points if point.name in SHOWN]
    points.sort(key=lambda point: (point.price, point.has_rate))
    return {point.name: f"{SHOWN[point.name]}  {cost(point)}" for point in points}


def cost(point: Point) -> str:
    """The price of a way in words."""
    return "[no run]" if point.price == 0 else f"[{point.price:.2g} runs]"


def plot(axis: Any, names: Mapping[str, str], points: Sequence[Point]) -> None:
    """A point for each mean, with a line up to the 95th percentile and the number beside it."""
    axis.set_xscale("log")
    axis.set_xlim(LOW, HIGH)
    axis.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"], fontsize=11)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    places = {name: i for i, name in enumerate(names)}
    for point in points:
        if point.name not in places:
            continue
        y = places[point.name]
        colour = COLOURS[1] if point.ours else GREY
        mean, high = inside(point.mean), inside(point.high)
        axis.plot([mean, high], [y, y], color=colour, alpha=0.4, linewidth=2)
        fill = "white" if point.has_rate else colour
        axis.plot(mean, y, "o", color=colour, markerfacecolor=fill, markersize=8)
        axis.annotate(
            f"{point.mean:.2g}" if point.mean < 10 else f"{point.mean:.0f}",
            (mean, y),
            (-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=10,
            color=colour,
        )


def inside(percent: float) -> float:
    """A loss, moved to the nearer end of the axis if it lies beyond."""
    return min(max(percent, LOW * 1.3), HIGH * 0.9)


def marks() -> list[Line2D]:
    """What the colours and the hollow points mean."""
    looks = (
        (COLOURS[1], COLOURS[1], "this package"),
        (GREY, GREY, "others"),
        (GREY, "white", "needs a rate tuned at rank 16"),
    )
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=8,
            color=edge,
            markerfacecolor=fill,
            label=words,
        )
        for edge, fill, words in looks
    ]
    line = Line2D(
        [], [], color=GREY, alpha=0.4, linewidth=2, label="up to the 95th percentile"
    )
    return [*handles, line]
