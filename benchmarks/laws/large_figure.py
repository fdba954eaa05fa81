"""Draw README's first picture: loss of the 7B model against learning rate, before and after conversion to one rank."""

from __future__ import annotations

import math
from typing import Any

from internals import rate_axis
from laws.others import Sweep
from matplotlib.figure import Figure
from study.grids import FULL

from rankaware_optim import suggest_lr

# of ranks 2 to 256
COLOURS = (
    "#440154",
    "#46307E",
    "#365C8D",
    "#277F8E",
    "#1FA187",
    "#4AC16D",
    "#9FB20C",
    "#D98B00",
)
SUGGESTED = {"linestyle": "", "marker": "v", "markersize": 9}
LOW, TOP = 0.155, 0.335  # losses in the frame
TUNED = 16


def draw_moved(sweep: Sweep, way: Any) -> Figure:
    """Draw loss against learning rate as it was set, and again converted to rank 16. A triangle is the suggested one."""
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    ranks = [rank for rank in sweep.ranks if rank != FULL]
    for rank, colour in (*zip(ranks, COLOURS, strict=True), (FULL, "black")):
        for axis, shift in zip(axes, (0.0, way(sweep, TUNED, rank)), strict=True):
            plot(axis, sweep, rank, shift, colour)
    titles = ("learning rate as it was set", "learning rate converted to rank 16")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_ylim(LOW, TOP)
        rate_axis(axis, "x")
    axes[0].set_ylabel("held-out loss of Qwen2.5-7B")
    axes[0].plot([], [], **SUGGESTED, color="0.4", label="suggested")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def plot(axis: Any, sweep: Sweep, rank: int, shift: float, colour: str) -> None:
    """Draw one curve, its learning rates divided by the multiplier from rank 16, and the suggested one on it."""
    curve = sweep.curves[rank]
    style = {"color": colour, "linewidth": 1.6}
    if rank == FULL:
        style |= {"linestyle": "--", "label": "full finetuning"}
    else:
        style["label"] = f"rank {rank}"
    rates = [2.0 ** (x - shift) for x in curve]
    axis.plot(rates, list(curve.values()), marker="o", markersize=3.5, **style)
    asked = sweep.asked(rank)
    x = math.log2(suggest_lr(asked, method=asked.method).lr)
    height = min(curve.values()) * (1 + sweep.lost(rank, x) / 100)
    # beyond the rates tried the loss is not known
    filled = colour if sweep.is_tried(rank, x) else "white"
    edge = {"markerfacecolor": filled, "markeredgecolor": "white"}
    if filled == "white":
        edge["markeredgecolor"] = colour
    axis.plot([2.0 ** (x - shift)], [height], **SUGGESTED, **edge)
