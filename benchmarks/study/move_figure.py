"""README's first picture: the best rates of a task before and after the move.

    python benchmarks/study/move_figure.py     # results/suite/move.png, of the runs on file

Vision classification at alpha = rank and in full finetuning, means over seeds. The second panel has the same runs: every
rate is divided by what the default law multiplies a rate of rank 16 with, at the widths of the shipped recipe. A small
dot is the mean of a rate's runs, a large one a curve's lowest point.
"""

from __future__ import annotations

import math
import sys
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from recording import draw

sys.path.insert(0, str(Path(__file__).parents[1]))

from study.configurations import start_of
from study.grids import FULL, Losses, curve, lowest
from study.optima import ranks_in, schemes_in, seeds_in
from study.suite import STORES, finished_in
from study.suite_figures import (
    RANK_COLOURS,
    legend_beside,
    name_ends,
    plot_means,
    rates,
)

from rankaware_optim import Falling, Recipe, Reference

RESTS_ON = ("laws.adam", "recipes")
DOMAIN = "vision_classification"
RECIPE = Path(__file__).parents[2] / "recipes" / "vision-classification-a.toml"
SHOWN = 0.45  # share of the gain above the best loss


def main() -> None:
    """Draw the picture."""
    done = finished_in([STORES / f"{DOMAIN}.jsonl"], "full")
    draw(draw_move(done, DOMAIN), STORES / "move.png", dpi=125)


def by_the_law(rank: int) -> float:
    """What the default law multiplies a rate of rank 16 with, at alpha = rank, at the widths of the shipped recipe."""
    recipe = Recipe.load(RECIPE)
    width = recipe.reference.fan_in
    here = Reference(method="full", fan_in=recipe.full_fan_in)
    if rank != FULL:
        here = Reference(rank, rank, fan_in=width)
    return Falling().multiplier(here.as_factor(), Reference(16, 16, fan_in=width))


def draw_move(done: Losses, domain: str) -> Figure:
    """Loss against rate at alpha = rank and in full finetuning: rates as they were set, and each as a rate of rank 16.

    The second panel divides every rate by what the default law multiplies a rate of rank 16 with.
    """
    scheme = schemes_in(done, domain)[0]
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    ranks = ranks_in(done, domain, scheme)
    colours = dict(zip(ranks, cycle(RANK_COLOURS), strict=False))
    lines = [
        ((domain, scheme, rank), {"color": colours[rank], "label": f"rank {rank}"})
        for rank in ranks
    ]
    whole = {"color": "black", "linestyle": "--", "label": "full finetuning"}
    lines.append(((domain, "full", FULL), whole))
    start = start_of(domain, done)
    by_cell = {cell: curve(done, cell, seeds_in(done, *cell[:2])) for cell, _ in lines}
    lowest_of_all = min(min(means.values()) for means in by_cell.values())
    gain = start - lowest_of_all
    top = lowest_of_all + SHOWN * gain
    for cell, style in lines:
        means = by_cell[cell]
        shift = math.log2(by_the_law(cell[2]))
        best = lowest(means)
        for axis, moved in zip(axes, (0.0, shift), strict=True):
            at = {2.0 ** (x - moved): mean for x, mean in means.items()}
            plot_means(axis, at, top, **style)
            axis.plot(2.0 ** (best - moved), means[best], "o", color=style["color"])
    titles = (
        "learning rate as it was set",
        "the same, moved to rank 16 by the law",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_ylim(lowest_of_all - 0.03 * gain, top + 0.03 * gain)
        rates(axis, "x")
    axes[0].set_ylabel("held-out loss, mean of the seeds", fontsize=8)
    axes[0].plot([], [], "o", color="0.3", label="lowest")
    name_ends(axes)
    legend_beside(figure, axes[:1])
    return figure


if __name__ == "__main__":
    main()
