"""This module draws a recipe as a figure with one panel for each rank and one panel for all ranks.

The panel for a rank shows its trials, the fitted loss and the recipe's learning rate. For
comparison, the panel for a rank also shows the user's learning rate and the learning rate that the
default scaling law predicts. If only one rank was tried, the figure has a single panel. The
optional dependency matplotlib (the extra `plots`) is only imported when a figure is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._printing import printable
from .._rate import Rate
from .._types import Method, Reference
from ..errors import PlotError, RankAwareError
from ..fitting import LossCurve
from ..laws import (
    SIGN_LIKE,
    Falling,
    Law,
    MuA,
    checked_multiplier,
    to_full,
)
from ..recipe import (
    ANY_WIDTH,
    Recipe,
    configuration,
    end_of_tried,
    known_rate,
    loss_curves,
    trials_text,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trials = dict[str, npt.NDArray[Any]]

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"
_BLUE, _ORANGE, _GREEN, _PURPLE = COLOURS[:4]
# The marker for each possible end of a trial. The keys appear in the legend.
MARKS = {"finished": "o", "diverged": "x", "stopped early": "D"}
# The height of a panel, as a multiple of the median distance of the scores from the best score.
# Scores that are farther away are drawn at the upper edge: judgement
_FAR = 4.0
# The smallest height of a panel, as a fraction of the best score. In a smaller panel, noise would
# look like a real difference: judgement
_LEAST = 1e-3
# A panel that spans more decades only has ticks at 1, because ticks at 1 and 3 would overlap:
# judgement
_MOST_DECADES = 2.7
# The panel of all ranks is drawn at these ranks.
_RANKS = {2**power for power in range(11)}


def recipe_figure(recipe: Recipe, lr: float | None = None) -> Figure:
    """Draw the trials of each rank, and the learning rate as a function of the rank.

    Args:
        recipe: the recipe.
        lr: a learning rate to mark in the figure, such as the one that you use now.

    Raises:
        PlotError: matplotlib is not installed, or the recipe's trials are missing.
    """
    trials = trials_of(recipe)
    if not trials:
        name, found = recipe.name, trials_text(recipe)
        raise PlotError(
            f"The recipe {name!r} cannot be drawn without its trials ({found}).",
            "Copy the recipe's .trials.safetensors file into the folder of its .toml file, and load"
            " the recipe again.",
        )
    by_rank = rates_by_rank(recipe)
    # Full finetuning is rank 0 in the trials, and comes last.
    ranks = sorted({*trials["rank"].tolist()}, key=lambda rank: rank or math.inf)
    # If only one rank was tried, alpha is unknown for other ranks, and the panel of all ranks would
    # be empty.
    has_rates = len(by_rank) > 1
    figure, axes = _figure(len(ranks) + has_rates)
    curves = loss_curves(recipe)
    # All panels of ranks use the same x axis, so that learning rates can be compared between them.
    for axis in axes[1 : len(ranks)]:
        axis.sharex(axes[0])
    for axis, rank in zip(axes, ranks, strict=False):
        of_rank = trials["rank"] == rank
        mine = {name: each[of_rank] for name, each in trials.items()}
        _draw_trials(axis, mine)
        _draw_curve(axis, curves.get(rank or None))
        _draw_rate(axis, known_rate(recipe, rank or None))
        _draw_comparisons(axis, recipe, rank or None, lr)
        axis.set_title(f"Rank {rank}" if rank else "Full finetuning", fontsize=11)
        _draw_end(axis, mine, end_of_tried(recipe, rank or None))
    if len(axes) > 1:
        _thin_ticks(axes[0])
    if has_rates:
        _draw_rates(axes[-1], recipe, by_rank)
    figure.suptitle(printable(recipe.name[:60]), parse_math=False, fontsize=12)
    _draw_legend(figure, axes)
    return figure


# --- values to draw -------------------------------------------------------------------------------


def trials_of(recipe: Recipe) -> Trials:
    """Return arrays with the rank, learning rate, score, seed and end of every trial.

    A rank of 0 means full finetuning. How a trial ended is one of the keys of `MARKS`, such as
    "diverged". If the recipe's trials are missing, the function returns an empty dictionary.
    """
    tensors = recipe.tensors
    if not {"rank", "own_lr", "value", "seed"} <= tensors.keys():
        return {}
    lost = tensors.get("diverged", ~np.isfinite(tensors["value"]))
    end = np.where(lost, "diverged", "finished")
    return {
        "rank": tensors["rank"],
        "lr": tensors["own_lr"],
        "value": tensors["value"].astype(float),
        "seed": tensors["seed"],
        "end": np.where(tensors.get("pruned", False), "stopped early", end),
    }


def rates_by_rank(recipe: Recipe) -> dict[int, Rate]:
    """Return the recipe's learning rates for the tried ranks and for powers of two.

    Ranks without a known learning rate are left out.
    """
    ranks = sorted({*recipe.ranks, *_RANKS})
    rates = {rank: known_rate(recipe, rank) for rank in ranks}
    return {rank: rate for rank, rate in rates.items() if rate is not None}


def default_prediction(recipe: Recipe, rank: int | None) -> float | None:
    """Return the learning rate that the default scaling law predicts for a rank.

    The law converts the recipe's learning rate from the reference configuration to this rank,
    without the corrections that were fitted to the trials. A rank of None means full finetuning.
    The function returns None in three cases:

    * The rank is the reference rank, whose learning rate needs no prediction.
    * The recipe contains only trials of full finetuning, so alpha is unknown.
    * The recipe's law is not µA. Only recipes with µA record the optimizer's family, on which the
      prediction depends.
    """
    own = recipe.reference
    mua = recipe.law.law
    if own.method == "full" or rank == own.rank or not isinstance(mua, MuA):
        return None
    law: Law = Falling(law=mua) if mua.family in SIGN_LIKE else mua
    reference = _with_width(own)
    method: Method = "lora" if rank else "full"
    multiplier = checked_multiplier if rank else to_full
    try:
        at = _with_width(configuration(recipe, rank, method=method)).as_factor()
        return recipe.lr * multiplier(law, at, reference)
    except RankAwareError:
        return None


def _with_width(at: Reference) -> Reference:
    return at if at.fan_in else replace(at, fan_in=ANY_WIDTH)


# --- matplotlib -----------------------------------------------------------------------------------


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Create a figure and return it with its panels, row by row.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "Plots need matplotlib, but matplotlib is not installed.",
            'Run pip install ".[plots]" in a clone of this package.',
        ) from error

    class Shown(Figure):
        """A figure that notebooks display even if pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    columns = 2 if panels in (2, 4) else min(3, panels)
    rows = math.ceil(panels / columns)
    # The HTML page scales every figure to about 8 inches, so letters are smaller in wider figures.
    width = {1: 7.0, 2: 9.0, 3: 11.0}[columns]
    size = (width, 1.3 + (3.7 if panels == 1 else 3.1) * rows)
    figure = Shown(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    return figure, axes


def _draw_trials(axis: Axes, trials: Trials) -> None:
    """Draw the trials of one rank, and choose the range of the y axis.

    Scores that are unknown or far above the best score are drawn at the upper edge of the panel. If
    the y axis included these scores, all other scores would look like a flat line.
    """
    finite = trials["value"][np.isfinite(trials["value"])]
    best = finite.min() if len(finite) else 0.0
    above = finite[finite > best] - best
    far = 0.0
    if len(above):
        far = min(_FAR * float(np.median(above)), 1.1 * float(above.max()))
    height = max(1e-9, _LEAST * abs(best), far)
    # A run that was stopped early has the score NaN. The comparison is then False, so the run is
    # drawn at the upper edge.
    inside = np.abs(trials["value"] - best) <= height
    heights = np.where(inside, trials["value"], best + 0.97 * height)
    for end, marker in MARKS.items():
        drawn = trials["end"] == end
        if drawn.any():
            axis.plot(
                trials["lr"][drawn],
                heights[drawn],
                label=f"trial: {end}",
                linestyle="",
                color=_BLUE,
                marker=marker,
                fillstyle="none",
                zorder=4,
            )
    # The label is "score", because the training function may have returned something else than a
    # loss.
    axis.set(ylabel="score, lower is better")
    axis.set_ylim(best - 0.15 * height, best + height)
    rate_axis(axis)


def _draw_curve(axis: Axes, curve: LossCurve | None) -> None:
    """Draw the fitted loss for the range of learning rates that were tried.

    Outside the range of learning rates that were tried, the loss curve would be a
    guess.
    """
    if curve is None:
        return
    low, high = curve.tried
    x = np.linspace(low, high, 200)
    middle, bottom, top = curve.losses(x)
    lower, upper = axis.get_ylim()
    height = upper - lower
    lower = min(lower, float(middle.min()) - 0.1 * height)
    axis.set_ylim(lower, upper)
    # Clip the curve, because an SVG file would contain the parts outside the panel too.
    bottom, top, middle = (
        np.clip(each, lower - height, upper + height) for each in (bottom, top, middle)
    )
    axis.fill_between(2.0**x, bottom, top, color=_BLUE, alpha=0.15, linewidth=0)
    axis.plot(2.0**x, middle, color=_BLUE, label="fitted loss, with its 90 % interval")


def _draw_rate(axis: Axes, rate: Rate | None) -> None:
    """Draw the recipe's learning rate with its 90 % interval and its ceiling."""
    if rate is None:
        return
    if rate.low is not None and rate.high is not None:
        axis.axvspan(rate.low, rate.high, color=_ORANGE, alpha=0.1, linewidth=0)
    label = "the recipe's learning rate, with its 90 % interval"
    axis.axvline(float(rate), color=_ORANGE, linestyle="--", label=label)
    if rate.ceiling is not None:
        axis.axvline(rate.ceiling, color=INK, linestyle=":", label="ceiling")


def _draw_comparisons(
    axis: Axes, recipe: Recipe, rank: int | None, lr: float | None
) -> None:
    """Draw the default scaling law's prediction and the user's learning rate."""
    predicted = default_prediction(recipe, rank)
    if predicted is not None:
        label = f"predicted by the default law from rank {recipe.reference.rank}"
        axis.axvline(predicted, color=_GREEN, linestyle="-.", label=label)
    if lr is not None:
        axis.axvline(
            lr, color=_PURPLE, linewidth=2, label=f"your learning rate, {lr:.3g}"
        )


def _draw_end(axis: Axes, trials: Trials, end: str) -> None:
    """Mark a rank whose best learning rate is the lowest or the highest that was tried.

    An arrow points from the best trial towards learning rates that were not tried. The title of the
    panel says whether the lowest or the highest learning rate was best.
    """
    if not end:
        return
    at = trials["lr"].min() if end == "lowest" else trials["lr"].max()
    score = np.nanmin(trials["value"][trials["lr"] == at])
    # The axis is logarithmic, so the length of the arrow is a factor.
    factor = 0.6 if end == "lowest" else 1 / 0.6
    axis.annotate(
        "",
        xy=(at * factor, score),
        xytext=(at, score),
        arrowprops={"arrowstyle": "->", "color": INK},
        zorder=5,
    )
    axis.set_title(f"{axis.get_title()}: best at the {end} lr tried", fontsize=11)


def _draw_rates(axis: Axes, recipe: Recipe, by_rank: dict[int, Rate]) -> None:
    """Draw the learning rate and its interval as a function of the rank.

    In the panel, squares mark the LoRA ranks that were tried.
    """
    ranks = np.array([*by_rank])
    rows = [(rate.low, float(rate), rate.high) for rate in by_rank.values()]
    low, lr, high = np.array(rows).T
    tried = np.isin(ranks, recipe.ranks)
    axis.fill_between(ranks, low, high, color=_ORANGE, alpha=0.1, linewidth=0)
    label = "the recipe's learning rate, with its 90 % interval"
    axis.plot(ranks, lr, color=_ORANGE, linestyle="--", label=label)
    axis.plot(
        ranks[tried],
        lr[tried],
        color=_ORANGE,
        marker="s",
        linestyle="",
        label="a rank that was tried",
    )
    predicted = {rank: default_prediction(recipe, rank) for rank in by_rank}
    # At the reference, the prediction equals the recipe's learning rate, so both lines meet.
    predicted[recipe.reference.rank or 0] = recipe.lr
    known = sorted((rank, x) for rank, x in predicted.items() if rank and x)
    if len(known) > 1:
        label = f"predicted by the default law from rank {recipe.reference.rank}"
        axis.plot(*zip(*known, strict=True), color=_GREEN, linestyle="-.", label=label)
    axis.set_xlabel("rank")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_title("All ranks", fontsize=11)
    rate_axis(axis, "y")


def _draw_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Draw a single legend for all panels that lists every label once."""
    named: dict[str, Artist] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    # Put the markers of the trials first. Sorting is stable, so the other labels keep their order.
    order = sorted(named, key=lambda label: not label.startswith("trial"))
    figure.legend(
        [named[label] for label in order],
        order,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10,
    )


def _thin_ticks(axis: Axes) -> None:
    """Only keep the ticks at powers of ten if the labels would otherwise overlap.

    The panels for ranks share their x axis, so a change to one panel applies to all of them.
    """
    from matplotlib.ticker import LogLocator

    low, high = axis.get_xlim()
    if math.log10(high / low) > _MOST_DECADES:
        axis.xaxis.set_major_locator(LogLocator())


def rate_axis(axis: Axes, side: str = "x") -> None:
    """Format the x or y axis for learning rates, with a logarithmic scale and suitable ticks."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(**{f"{side}scale": "log", f"{side}label": "learning rate, per step"})
    own = getattr(axis, f"{side}axis")
    own.set_major_locator(LogLocator(subs=(1, 3)))
    own.set_major_formatter(lambda value, _: f"{value:.6g}")
    own.set_minor_locator(NullLocator())
