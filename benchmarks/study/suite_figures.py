"""Figures of `suite.py`: the best learning rate of each LoRA rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from internals import rate_axis
from matplotlib.figure import Figure
from recording import draw
from scipy.interpolate import PchipInterpolator
from study.grids import FULL, Losses
from study.moving import octaves
from study.optima import (
    domains_in,
    optimum,
    ranks_in,
    schemes_in,
)
from study.regret import DEFAULT, LAWS

FINE = 100  # points of a law's curve

TITLES = {
    "Init[A], s = 1": "alpha = rank",
    "Init[A], s = 1/r": "alpha fixed",
    "Init[A], s = r^-1/2": "alpha fixed, rsLoRA",
    "Init[B], s = 1": "alpha = rank, A starts at zero",
}
# µA without the fall lies under one of these two in every panel: one line would hide the other.
DRAWN = {
    "the paper's law": ("the paper's law", "--", "#D55E00"),
    DEFAULT: ("this package's default law", "-", "#0072B2"),
}


def draw_all(done: Losses, folder: Path) -> list[Path]:
    """Draw a figure of each domain, and return their paths."""
    paths = []
    for domain in domains_in(done):
        paths.append(folder / f"{domain}-rate.png")
        draw(draw_rates(done, domain), paths[-1], dpi=90)
    return paths


def draw_rates(done: Losses, domain: str) -> Figure:
    """The best learning rate of each seed over the rank, a panel for each configuration, with the laws' curves."""
    schemes = schemes_in(done, domain)
    rows = math.ceil(len(schemes) / 2)
    figure = Figure(figsize=(9.5, 1.2 + 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharey=True, squeeze=False).flatten()
    full = optimum(done, (domain, "full", FULL)).x
    for axis, scheme in zip(axes, schemes, strict=False):
        axis.set_title(TITLES.get(scheme, scheme), fontsize=12)
        ranks = ranks_in(done, domain, scheme)
        points = [
            (rank, x)
            for rank in ranks
            for x in optimum(done, (domain, scheme, rank)).by_seed
            if x is not None
        ]
        for rank, x in points:
            axis.plot(
                rank,
                2.0**x,
                "o",
                color="black",
                alpha=0.6,
                ms=6,
                label="best of a seed",
            )
        draw_laws(axis, domain, scheme, points)
        if full is not None:
            axis.axhline(
                2.0**full, color="0.6", linestyle=":", label="best of full finetuning"
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, list(map(str, ranks)))
        axis.minorticks_off()
        axis.tick_params(labelsize=11)
        axis.set_xlabel("rank", fontsize=11)
        rate_axis(axis, "y")
        axis.yaxis.label.set(text="best learning rate", fontsize=11)
        axis.label_outer()
        axis.xaxis.set_tick_params(labelbottom=True)
    for axis in axes[len(schemes) :]:
        axis.remove()
    figure.suptitle(
        f"{domain.replace('_', ' ').capitalize()}: how the best learning rate moves with the rank",
        fontsize=13,
    )
    lines = {
        name: line
        for axis in axes[: len(schemes)]
        for line, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        lines.values(),
        lines,
        loc="outside lower center",
        ncols=4,
        fontsize=11,
        frameon=False,
    )
    return figure


def draw_laws(
    axis: Any, domain: str, scheme: str, points: list[tuple[int, float]]
) -> None:
    """Draw the laws through the points' mean, with splines between the ranks."""
    ranks = sorted({rank for rank, _ in points})
    if len(ranks) < 2:
        return
    logs = np.log2(ranks)
    fine = np.linspace(logs[0], logs[-1], FINE)
    middle = float(np.mean([x for _, x in points]))
    for name, (label, style, colour) in DRAWN.items():
        moved = np.array([octaves(domain, scheme, rank, LAWS[name]) for rank in ranks])
        between = PchipInterpolator(logs, middle + moved - moved.mean())
        axis.plot(
            2.0**fine,
            2.0 ** between(fine),
            linestyle=style,
            color=colour,
            linewidth=2,
            label=label,
        )
