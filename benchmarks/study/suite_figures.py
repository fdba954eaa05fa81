"""Figures of `suite.py`: loss against rate, and the best rate against rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from internals import rate_axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from recording import draw as write
from scipy.interpolate import PchipInterpolator
from study.configurations import start_of
from study.grids import FULL, Losses, curve
from study.moving import octaves
from study.optima import (
    domains_in,
    exponent_of,
    optimum,
    ranks_in,
    schemes_in,
    seeds_in,
)
from study.regret import LAWS

from rankaware_optim import Law

SHOWN = 0.9  # share of the losses in view: the highest would flatten the rest
# from dark to light as the rank rises
RANK_COLOURS = (
    "#440154",
    "#3B528B",
    "#21918C",
    "#5EC962",
    "#B5A000",
)

SCORE = "held-out score, lower is better"
ENDS = {"^": "above the frame", "x": "a seed diverged"}
EDGE = 0.97  # where they stand, as a share of the panel's height
FINE = 100  # points of a law's curve

LAW_STYLES = (
    ("--", "#D55E00"),
    ("-", "#0072B2"),
    ("-.", "#CC79A7"),
    ((0, (1, 1)), "#E69F00"),
)


def draw_all(done: Losses, folder: Path, laws: Mapping[str, Law] = LAWS) -> list[Path]:
    """Draw two figures of each domain, and return their paths."""
    paths = []
    for domain in domains_in(done):
        for name, draw in (
            ("loss", draw_losses),
            ("rate", partial(draw_rates, laws=laws)),
        ):
            figure = draw(done, domain)
            paths.append(folder / f"{domain}-{name}.png")
            write(figure, paths[-1], dpi=90)
    return paths


def panels(done: Losses, domain: str, what: str) -> tuple[Figure, list[Any], list[str]]:
    schemes = schemes_in(done, domain)
    figure = Figure(figsize=(3.2 * len(schemes), 3.0), layout="constrained")
    axes = list(figure.subplots(1, len(schemes), squeeze=False)[0])
    for axis, scheme in zip(axes, schemes, strict=True):
        axis.set_title(scheme, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{domain.replace('_', ' ')}: {what}", fontsize=10)
    return figure, axes, schemes


def draw_losses(done: Losses, domain: str) -> Figure:
    """Held-out score against rate, with one line for each rank and a dashed line for full finetuning."""
    figure, axes, schemes = panels(done, domain, "mean score of the seeds by rate")
    losses = [
        loss for job, loss in done.items() if job.domain == domain and loss is not None
    ]
    top, bottom = (
        min(start_of(domain, done), float(np.quantile(losses, SHOWN))),
        min(losses),
    )
    every = sorted(
        {rank for scheme in schemes for rank in ranks_in(done, domain, scheme)}
    )
    colours = dict(zip(every, cycle(RANK_COLOURS), strict=False))
    for axis, scheme in zip(axes, schemes, strict=True):
        for rank in ranks_in(done, domain, scheme):
            style = {"color": colours[rank], "label": f"r = {rank}"}
            plot_curve(axis, done, (domain, scheme, rank), top, **style)
        style = {"color": "black", "linestyle": "--", "label": "full"}
        plot_curve(axis, done, (domain, "full", FULL), top, **style)
        axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.08 * (top - bottom))
        rates(axis, "x")
    axes[0].set_ylabel(SCORE, fontsize=8)
    name_ends(axes)
    legend_beside(figure, axes)
    return figure


def rates(axis: Any, side: str, named: bool = True) -> None:
    """Make an axis ("x" or "y") one of rates in the panels' small type, with or without its label."""
    rate_axis(axis, side)
    own = getattr(axis, f"{side}axis")
    if side == "x":  # a narrow panel has no room for more
        own.set_major_locator(LogLocator())
    own.label.set(text="learning rate" if named else "", fontsize=8)


def legend_beside(figure: Figure, axes: Sequence[Any]) -> None:
    """Draw one legend for all panels, outside of them."""
    each = {
        name: line
        for axis in axes
        for line, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        each.values(), each, loc="outside right center", fontsize=7, frameon=False
    )


def plot_curve(
    axis: Any, done: Losses, cell: tuple[str, str, int], top: float, **style: Any
) -> None:
    """Draw the mean scores of a rank. Those above the top are marks at the upper edge."""
    means = curve(done, cell, seeds_in(done, *cell[:2]))
    plot_means(axis, {2.0**x: mean for x, mean in means.items()}, top, **style)


def plot_means(
    axis: Any, means: Mapping[float, float], top: float, **style: Any
) -> None:
    """Draw means by rate: a dot each, and at the upper edge a triangle above the top and a cross if it is infinite."""
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    axis.plot(
        list(finite),
        list(finite.values()),
        marker="o",
        markersize=3,
        linewidth=1.2,
        **style,
    )
    above = [rate for rate, mean in finite.items() if mean > top]
    lost = [rate for rate in means if rate not in finite]
    for marker, at in zip(ENDS, (above, lost), strict=True):
        axis.plot(at, [EDGE] * len(at), **end_style(axis, marker, style["color"]))


def end_style(axis: Any, marker: str, colour: str) -> dict[str, Any]:
    """How a mark at the upper edge of a panel is drawn."""
    return {
        "transform": axis.get_xaxis_transform(),
        "linestyle": "",
        "marker": marker,
        "markersize": 4,
        "color": colour,
        "markerfacecolor": "none",
    }


def name_ends(axes: Sequence[Any]) -> None:
    """Name the marks at the upper edge, those that there are, in the legend of the first panel."""
    lines = [line for axis in axes for line in axis.get_lines()]
    used = {line.get_marker() for line in lines if len(line.get_xdata())}
    for marker in filter(used.__contains__, ENDS):
        style = end_style(axes[0], marker, "0.3")
        axes[0].plot([], [], **style, label=ENDS[marker])


def draw_rates(done: Losses, domain: str, laws: Mapping[str, Law]) -> Figure:
    """Best rate of each seed against rank, with the laws' and a fitted power's curves through the points' mean."""
    figure, axes, schemes = panels(done, domain, "best rate of each seed by rank")
    full = optimum(done, (domain, "full", FULL)).x
    for axis, scheme in zip(axes, schemes, strict=True):
        best = {
            rank: optimum(done, (domain, scheme, rank))
            for rank in ranks_in(done, domain, scheme)
        }
        points = [
            (rank, x)
            for rank, found in best.items()
            for x in found.by_seed
            if x is not None
        ]
        at = [(rank, 2.0**x) for rank, x in points]
        axis.plot(
            *zip(*at, strict=True) if at else ([], []),
            "o",
            color="black",
            markersize=4,
            label="measured",
        )
        plot_laws(axis, done, domain, scheme, points, laws)
        if full is not None:
            axis.axhline(
                2.0**full, color="#999999", linestyle=":", label="full finetuning"
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(best), list(map(str, best)))
        axis.minorticks_off()
        axis.set_xlabel("rank", fontsize=8)
        rates(axis, "y", named=axis is axes[0])
    legend_beside(figure, axes)
    return figure


def plot_laws(
    axis: Any,
    done: Losses,
    domain: str,
    scheme: str,
    points: list[tuple[int, float]],
    laws: Mapping[str, Law],
) -> None:
    """Draw laws through the points' mean, with splines between the ranks, and a power of the rank."""
    ranks = sorted({rank for rank, _ in points})
    if len(ranks) < 2:
        return
    logs = np.log2(ranks)
    fine = np.linspace(logs[0], logs[-1], FINE)
    middle = float(np.mean([x for _, x in points]))
    for (name, law), (style, colour) in zip(
        laws.items(), cycle(LAW_STYLES), strict=False
    ):
        moved = np.array([octaves(domain, scheme, rank, law) for rank in ranks])
        between = PchipInterpolator(logs, middle + moved - moved.mean())
        drawn = {"linestyle": style, "color": colour, "label": name}
        axis.plot(2.0**fine, 2.0 ** between(fine), **drawn)
    if (found := exponent_of(done, domain, scheme)) is not None:
        fitted = 2.0 ** (middle + found.slope * (logs - logs.mean()))
        axis.plot(
            ranks, fitted, ":", color="#009E73", label="power of the rank, fitted"
        )
