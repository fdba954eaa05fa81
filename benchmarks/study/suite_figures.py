"""Figures of `suite.py`: loss against rate, the best rate against rank, and the loss over both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from study.configurations import start_of
from study.grids import FULL, Losses, curve, lowest
from study.moving import octaves
from study.optima import (
    domains_in,
    exponent_of,
    optimum,
    ranks_in,
    schemes_in,
    seeds_in,
)
from study.regret import LAWS, Moved
from study.suite_tables import README_WAYS, regrets_in, settings

from rankaware_optim import Law
from rankaware_optim._figures import COLOURS, rate_axis

SHOWN = 0.9  # share of the losses in view: the highest would flatten the rest
MOST = 300.0  # % of the gain: larger regrets are drawn here in the summary
# from dark to light as the rank rises
RANK_COLOURS = (
    "#440154",
    "#3B528B",
    "#21918C",
    "#5EC962",
    "#B5A000",
)

LAW_STYLES = (
    ("--", "#D55E00"),
    ("-", "#0072B2"),
    ("-.", "#CC79A7"),
    ((0, (1, 1)), "#E69F00"),
)


def draw_all(done: Losses, folder: Path, laws: Mapping[str, Law] = LAWS) -> list[Path]:
    """Draw three figures of each domain, and return their paths."""
    paths = []
    for domain in domains_in(done):
        for name, draw in (
            ("loss", draw_losses),
            ("rate", partial(draw_rates, laws=laws)),
            ("surface", draw_surface),
        ):
            figure = draw(done, domain)
            paths.append(folder / f"{domain}-{name}.png")
            figure.savefig(paths[-1], dpi=90)
    return paths


def panels(done: Losses, domain: str) -> tuple[Figure, list[Any], list[str]]:
    schemes = schemes_in(done, domain)
    figure = Figure(figsize=(3.2 * len(schemes), 3.0), layout="constrained")
    axes = list(figure.subplots(1, len(schemes), squeeze=False)[0])
    for axis, scheme in zip(axes, schemes, strict=True):
        axis.set_title(scheme, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.suptitle(domain, fontsize=10)
    return figure, axes, schemes


def draw_losses(done: Losses, domain: str) -> Figure:
    """Held-out loss against log2 rate, with one line for each rank and a dashed line for full finetuning."""
    figure, axes, schemes = panels(done, domain)
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
            plot_curve(
                axis,
                done,
                (domain, scheme, rank),
                color=colours[rank],
                marker="o",
                label=f"r = {rank}",
            )
        plot_curve(
            axis,
            done,
            (domain, "full", FULL),
            color="black",
            linestyle="--",
            label="full",
        )
        axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.02 * (top - bottom))
        rates(axis, "x")
    axes[0].set_ylabel("held-out score, lower is better", fontsize=8)
    legend_beside(figure, axes)
    return figure


def rates(axis: Any, side: str, named: bool = True) -> None:
    """Make an axis ("x" or "y") one of rates in the panels' small type, with or without its label."""
    rate_axis(axis, side)
    getattr(axis, f"{side}axis").label.set(
        text="learning rate" if named else "", fontsize=8
    )


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
    axis: Any, done: Losses, cell: tuple[str, str, int], **style: Any
) -> None:
    means = curve(done, cell, seeds_in(done, *cell[:2]))
    finite = {x: loss for x, loss in means.items() if math.isfinite(loss)}
    axis.plot(
        [2.0**x for x in finite],
        list(finite.values()),
        markersize=3,
        linewidth=1.2,
        **style,
    )


def draw_rates(done: Losses, domain: str, laws: Mapping[str, Law]) -> Figure:
    """Best rate of each seed against rank, with the laws' and a fitted power's curves through the points' mean."""
    figure, axes, schemes = panels(done, domain)
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
    if not points:
        return
    ranks = sorted({rank for rank, _ in points})
    middle = float(np.mean([x for _, x in points]))
    for (name, law), (style, colour) in zip(
        laws.items(), cycle(LAW_STYLES), strict=False
    ):
        moved = np.array([octaves(domain, scheme, rank, law) for rank in ranks])
        axis.plot(
            ranks,
            2.0 ** (middle + moved - moved.mean()),
            linestyle=style,
            color=colour,
            label=name,
        )
    if (found := exponent_of(done, domain, scheme)) is not None:
        logs = np.log2(ranks)
        fitted = 2.0 ** (middle + found.slope * (logs - logs.mean()))
        axis.plot(
            ranks, fitted, ":", color="#009E73", label="power of the rank, fitted"
        )


def draw_surface(done: Losses, domain: str) -> Figure:
    """The loss over rank and rate, with each rank's best rate marked."""
    figure, axes, schemes = panels(done, domain)
    start = start_of(domain, done)
    for axis, scheme in zip(axes, schemes, strict=True):
        ranks = ranks_in(done, domain, scheme)
        means = [
            curve(done, (domain, scheme, rank), seeds_in(done, domain, scheme))
            for rank in ranks
        ]
        xs = sorted({x for each in means for x in each})
        values = np.array(
            [[min(each.get(x, math.nan), start) for each in means] for x in xs]
        )
        shown = axis.pcolormesh(
            range(len(ranks)), xs, values, shading="nearest", cmap="viridis_r"
        )
        axis.plot(
            range(len(ranks)),
            list(map(lowest, means)),
            "o-",
            color="white",
            markersize=4,
        )
        axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        axis.set_yticks(xs[::2], [f"{2.0**x:.2g}" for x in xs[::2]])
        axis.set_xlabel("rank", fontsize=8)
        figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=6)
    axes[0].set_ylabel("learning rate", fontsize=8)
    return figure


def draw_summary(moved: Sequence[Moved]) -> Figure:
    """The README's figure: one dot for the regret of each move, and a bar for the median of each way."""
    ways = list(reversed(README_WAYS.items()))
    figure = Figure(figsize=(11.2, 3.4), layout="constrained")
    axes = figure.subplots(1, len(settings()), sharey=True)
    for axis, (title, setting) in zip(axes, settings().items(), strict=True):
        for y, (way, _) in enumerate(ways):
            plot_moves(axis, [100 * x for x in regrets_in(moved, way, *setting)], y)
        axis.set_title(title.replace(", ", ",\n", 1), fontsize=9)
        axis.set_xscale("symlog", linthresh=1, linscale=0.5)
        axis.set_xlim(-0.3, 1.3 * MOST)
        axis.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"], fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axis.set_yticks(range(len(ways)), [words for _, words in ways], fontsize=9)
    axis.set_ylim(-0.5, len(ways) - 0.4)
    figure.suptitle(
        "What a moved rate loses: a dot is one move, a bar the median", fontsize=10
    )
    figure.supxlabel(
        f"lost share of the attainable gain, %; a dot at {MOST:g} lost more, or diverged",
        fontsize=8,
    )
    return figure


def plot_moves(axis: Any, regrets: Sequence[float], y: int) -> None:
    """Draw a way's regrets (%) in row `y`, spread in height by their order so that few dots hide another."""
    if regrets:
        heights = y + 0.22 * np.sin(2.4 * np.arange(len(regrets)))
        axis.plot(
            np.clip(regrets, -0.3, MOST),
            heights,
            "o",
            color=COLOURS[0],
            markersize=2.5,
            alpha=0.35,
            clip_on=False,
        )
        axis.plot(
            [min(statistics.median(regrets), MOST)] * 2,
            [y - 0.35, y + 0.35],
            color=COLOURS[1],
            linewidth=2.5,
        )
