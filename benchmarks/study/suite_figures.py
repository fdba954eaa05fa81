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
from study.optima import domains_in, exponent_of, optimum, ranks_in, schemes_in, seeds_in
from study.regret import LAWS, Moved, pooled
from study.suite_tables import COMPARED, TARGETS

from rankaware_optim import Law
from rankaware_optim._figures import COLOURS as PALETTE

SHOWN = 0.9  # of the losses: the far ones would flatten the rest
MOST = 300.0  # % of the gain, the end of the summary's axis
RANK_COLOURS = ("#440154", "#3B528B", "#21918C", "#5EC962", "#B5A000")  # dark to light with the rank
MARKERS = "os^DvPX*"  # one more than the colours: no two of 56 domains look alike
COLOURS = (*PALETTE, "#000000")
LAW_STYLES = (("--", "#D55E00"), ("-", "#0072B2"), ("-.", "#CC79A7"), ((0, (1, 1)), "#E69F00"))


def draw_all(done: Losses, folder: Path, laws: Mapping[str, Law] = LAWS) -> list[Path]:
    """Three figures a domain."""
    paths = []
    for domain in domains_in(done):
        for name, draw in (("loss", draw_losses), ("rate", partial(draw_rates, laws=laws)), ("surface", draw_surface)):
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
    """Held-out loss against log2 rate, a line a rank; full finetuning dashed."""
    figure, axes, schemes = panels(done, domain)
    losses = [loss for job, loss in done.items() if job.domain == domain and loss is not None]
    top, bottom = min(start_of(domain, done), float(np.quantile(losses, SHOWN))), min(losses)
    every = sorted({rank for scheme in schemes for rank in ranks_in(done, domain, scheme)})
    colours = dict(zip(every, cycle(RANK_COLOURS), strict=False))
    for axis, scheme in zip(axes, schemes, strict=True):
        for rank in ranks_in(done, domain, scheme):
            plot_curve(axis, done, (domain, scheme, rank), color=colours[rank], marker="o", label=f"r = {rank}")
        plot_curve(axis, done, (domain, "full", FULL), color="black", linestyle="--", label="full")
        axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.02 * (top - bottom))
        axis.set_xlabel("log2 rate", fontsize=8)
    axes[0].set_ylabel("held-out score, lower is better", fontsize=8)
    axes[0].legend(fontsize=6)
    return figure


def plot_curve(axis: Any, done: Losses, cell: tuple[str, str, int], **style: Any) -> None:
    means = curve(done, cell, seeds_in(done, *cell[:2]))
    finite = {x: loss for x, loss in means.items() if math.isfinite(loss)}
    axis.plot(list(finite), list(finite.values()), markersize=3, linewidth=1.2, **style)


def draw_rates(done: Losses, domain: str, laws: Mapping[str, Law]) -> Figure:
    """log2 of the best rate against rank, seed by seed; the laws through its middle, and the fit."""
    figure, axes, schemes = panels(done, domain)
    full = optimum(done, (domain, "full", FULL)).x
    for axis, scheme in zip(axes, schemes, strict=True):
        best = {rank: optimum(done, (domain, scheme, rank)) for rank in ranks_in(done, domain, scheme)}
        points = [(rank, x) for rank, found in best.items() for x in found.by_seed if x is not None]
        axis.plot(
            *zip(*points, strict=True) if points else ([], []), "o", color="black", markersize=4, label="measured"
        )
        plot_laws(axis, done, domain, scheme, points, laws)
        if full is not None:
            axis.axhline(full, color="#999999", linestyle=":", label="full finetuning")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("rank", fontsize=8)
    axes[0].set_ylabel("log2 best rate", fontsize=8)
    axes[0].legend(fontsize=6)
    return figure


def plot_laws(
    axis: Any, done: Losses, domain: str, scheme: str, points: list[tuple[int, float]], laws: Mapping[str, Law]
) -> None:
    if not points:
        return
    ranks = sorted({rank for rank, _ in points})
    middle = float(np.mean([x for _, x in points]))
    for (name, law), (style, colour) in zip(laws.items(), cycle(LAW_STYLES), strict=False):
        moved = np.array([octaves(domain, scheme, rank, law) for rank in ranks])
        axis.plot(ranks, middle + moved - moved.mean(), linestyle=style, color=colour, label=name)
    if (found := exponent_of(done, domain, scheme)) is not None:
        logs = np.log2(ranks)
        axis.plot(ranks, middle + found.slope * (logs - logs.mean()), ":", color="#009E73", label="fit")


def draw_surface(done: Losses, domain: str) -> Figure:
    """The loss over rank and rate, each rank's best marked."""
    figure, axes, schemes = panels(done, domain)
    start = start_of(domain, done)
    for axis, scheme in zip(axes, schemes, strict=True):
        ranks = ranks_in(done, domain, scheme)
        means = [curve(done, (domain, scheme, rank), seeds_in(done, domain, scheme)) for rank in ranks]
        xs = sorted({x for each in means for x in each})
        values = np.array([[min(each.get(x, math.nan), start) for each in means] for x in xs])
        shown = axis.pcolormesh(range(len(ranks)), xs, values, shading="nearest", cmap="viridis_r")
        axis.plot(range(len(ranks)), list(map(lowest, means)), "o-", color="white", markersize=4)
        axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        axis.set_xlabel("rank", fontsize=8)
        figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=6)
    axes[0].set_ylabel("log2 rate", fontsize=8)
    return figure


def draw_summary(moved: Sequence[Moved]) -> Figure:
    """The README's figure: a rate's regret after a move, by way and domain; a median's marker, a line to the worst."""
    found = {words: pooled(moved, way) for way, words in COMPARED.items()}
    shown = {words: by_domain for words, by_domain in reversed(found.items()) if by_domain}
    domains = list(dict.fromkeys(each.domain for each in moved))
    figure = Figure(figsize=(9.0, 1.0 + len(shown) * (0.26 + 0.12 * len(domains))), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for which, (axis, target) in enumerate(zip(axes, TARGETS, strict=True)):
        axis.set_title(f"to {target}", fontsize=10)
        for number, (domain, *style) in enumerate(zip(domains, cycle(MARKERS), cycle(COLOURS), strict=False)):
            lift = 0.7 * (0.5 - (number + 0.5) / len(domains))
            plot_moves(axis, [of.get(domain, ([], []))[which] for of in shown.values()], lift, *style)
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(min(-1.0, 100 * min(x for each in moved for x in (*each.lora, *each.full))), MOST)
        axis.set_xlabel(f"regret, %, from median to worst ({MOST:g}: or diverged)", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), list(shown), fontsize=9)
    axes[0].set_ylim(-0.5, len(shown) - 0.5)
    for domain, marker, colour in zip(domains, cycle(MARKERS), cycle(COLOURS), strict=False):
        axes[1].plot([], [], marker, color=colour, label=domain.replace("_", " "))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def plot_moves(axis: Any, regrets: Sequence[Sequence[float]], lift: float, marker: str, colour: str) -> None:
    """A domain's regrets, a list a way: its median a marker, a line to its worst."""
    for y, shares in enumerate(regrets):
        ends = [min(100 * x, MOST) for x in (statistics.median(shares), max(shares))] if shares else []
        axis.plot(ends, [y + lift] * len(ends), color=colour, linewidth=1)
        axis.plot(ends[:1], [y + lift] * len(ends[:1]), marker, color=colour, markersize=5)
