"""Figures of `suite.py`: the best rate against rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from internals import rate_axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from recording import draw
from scipy.interpolate import PchipInterpolator
from study.grids import FULL, Losses
from study.moving import octaves
from study.optima import (
    domains_in,
    exponent_of,
    optimum,
    ranks_in,
    schemes_in,
)
from study.regret import LAWS

FINE = 100  # points of a law's curve

LAW_STYLES = (
    ("--", "#D55E00"),
    ("-", "#0072B2"),
    ("-.", "#CC79A7"),
    ((0, (1, 1)), "#E69F00"),
)


def draw_all(done: Losses, folder: Path) -> list[Path]:
    """Draw a figure of each domain, and return their paths."""
    paths = []
    for domain in domains_in(done):
        paths.append(folder / f"{domain}-rate.png")
        draw(draw_rates(done, domain), paths[-1], dpi=90)
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


def draw_rates(done: Losses, domain: str) -> Figure:
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
        plot_laws(axis, done, domain, scheme, points)
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
) -> None:
    """Draw laws through the points' mean, with splines between the ranks, and a power of the rank."""
    ranks = sorted({rank for rank, _ in points})
    if len(ranks) < 2:
        return
    logs = np.log2(ranks)
    fine = np.linspace(logs[0], logs[-1], FINE)
    middle = float(np.mean([x for _, x in points]))
    for (name, law), (style, colour) in zip(LAWS.items(), LAW_STYLES, strict=False):
        moved = np.array([octaves(domain, scheme, rank, law) for rank in ranks])
        between = PchipInterpolator(logs, middle + moved - moved.mean())
        drawn = {"linestyle": style, "color": colour, "label": name}
        axis.plot(2.0**fine, 2.0 ** between(fine), **drawn)
    if (found := exponent_of(done, domain, scheme)) is not None:
        fitted = 2.0 ** (middle + found.slope * (logs - logs.mean()))
        axis.plot(
            ranks, fitted, ":", color="#009E73", label="power of the rank, fitted"
        )
