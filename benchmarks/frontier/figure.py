"""The picture of the frontier: what is lost against what it costs, a point a way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from internals import COLOURS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

LOW, HIGH = 0.08, 500.0  # % of the gain, the ends of the axis
APART = 0.115  # least distance of two names, as a share of log10's decade
WIDTH = 9.2  # of a panel, in the units of places


class Places(NamedTuple):
    """Where prices stand in a panel: the highest price of each place, its name, and the place."""

    highest: tuple[float, ...]
    names: tuple[str, ...]
    at: tuple[float, ...]

    def of(self, price: float) -> float:
        for highest, place in zip(self.highest, self.at, strict=True):
            if price <= highest:
                return place
        return self.at[-1]


SHORT = Places((0.0, 20.0, 96.0), ("0", "11 to 16", "54 to 96"), (0.0, 2.6, 6.7))
LONG = Places((0.0, 0.6, 1.2, 4.0), ("0", "¼ to ½", "1", "2"), (0.0, 2.35, 3.2, 5.4))


class Point(NamedTuple):
    """A way: its name, price in runs, mean loss and its 95th percentile in %, whether it is ours and needs a rate."""

    name: str
    price: float
    mean: float
    high: float
    ours: bool
    has_rate: bool


class Evidence(NamedTuple):
    """A row of panels: its title, where prices stand, and the points of each column."""

    title: str
    places: Places
    columns: Mapping[str, Sequence[Point]]


def draw_frontier(rows: Sequence[Evidence]) -> Figure:
    """A row of panels for each evidence, a panel for each of its columns."""
    count = len(rows[0].columns)
    figure = Figure(figsize=(6.2 * count, 4.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, sharey=True, squeeze=False)
    for of, panels in zip(rows, axes, strict=True):
        for axis, (column, points) in zip(panels, of.columns.items(), strict=True):
            axis.set_title(f"{of.title}: {column}", fontsize=9)
            plot(axis, of.places, points)
        panels[0].set_ylabel(
            "lost, % of what training gains (500: diverged)", fontsize=9
        )
    for axis in axes[-1]:
        axis.set_xlabel("runs trained before the real one", fontsize=9)
    figure.legend(
        handles=marks(),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    return figure


def plot(axis: Any, places: Places, points: Sequence[Point]) -> None:
    axis.set_yscale("log")
    axis.set_ylim(LOW, HIGH)
    axis.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"], fontsize=8)
    axis.set_xlim(-0.25, WIDTH)
    axis.set_xticks(places.at, places.names, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    by_place: dict[float, list[Point]] = {}
    for point in points:
        by_place.setdefault(places.of(point.price), []).append(point)
    for x, mine in by_place.items():
        heights = spread([height(point.mean) for point in mine])
        for point, y in zip(mine, heights, strict=True):
            plot_point(axis, x, point, y)


def plot_point(axis: Any, x: float, point: Point, label_y: float) -> None:
    """The mean, a line up to the 95th percentile, and the name beside it."""
    colour = COLOURS[1] if point.ours else "0.35"
    y = height(point.mean)
    axis.plot([x, x], [y, height(point.high)], color=colour, alpha=0.25, linewidth=1)
    fill = "none" if point.has_rate else colour
    axis.plot(x, y, "o", color=colour, markerfacecolor=fill, markersize=5)
    axis.annotate(
        point.name.replace("`", ""),
        (x, y),
        (x + 0.14, label_y),
        fontsize=7,
        color=colour,
        va="center",
        weight="bold" if point.ours else "normal",
        arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.3, "linewidth": 0.6},
    )


def height(percent: float) -> float:
    return min(max(percent, LOW * 1.15), HIGH * 0.9)


def spread(heights: Sequence[float]) -> list[float]:
    """Heights of names, moved upwards until no two are closer than `APART` decades."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved, last = [0.0] * len(heights), -math.inf
    for at in order:
        last = max(math.log10(heights[at]), last + APART)
        moved[at] = 10**last
    return moved


def marks() -> list[Line2D]:
    looks = (
        (COLOURS[1], COLOURS[1], "this package"),
        ("0.35", "0.35", "others"),
        ("0.35", "none", "hollow: needs a rate that was tuned at rank 16"),
    )
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            color=edge,
            markerfacecolor=fill,
            label=words,
        )
        for edge, fill, words in looks
    ]
    line = Line2D([], [], color="0.35", alpha=0.4, label="up to the 95th percentile")
    return [*handles, line]
