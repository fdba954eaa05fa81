"""The picture of a recipe: one panel for each rank that was tried, and one of all ranks.

A panel of a rank shows its trials, the fitted loss, and the recipe's learning rate beside the
prediction of the default law and the user's own. If only one rank was tried, its panel fills the
figure. matplotlib (the extra `plots`) is imported when a figure is drawn.
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
# How a trial ended, in the legend, and its marker.
MARKS = {"finished": "o", "diverged": "x", "stopped early": "D"}
# The frame of a panel: chosen by judgement.
_FAR = 4.0  # times the median score above the best. Scores farther off are drawn at the upper edge
_LEAST = 1e-3  # of the best score: a frame's least height, so that noise does not look like a bowl
_MOST_DECADES = (
    2.7  # a panel of more decades has ticks at 1 only, since those at 3 would overlap
)
_RANKS = {
    2**power for power in range(11)
}  # ranks at which the panel of all ranks is drawn


def recipe_figure(recipe: Recipe, lr: float | None = None) -> Figure:
    """Return a figure of the trials of each rank and of the learning rates by rank.

    Args:
        recipe: the recipe.
        lr: a learning rate to compare with, such as the one that you used so far.

    Raises:
        PlotError: matplotlib is not installed, or the recipe has no trials.
    """
    trials = trials_of(recipe)
    if not trials:
        raise PlotError(
            f"The recipe {recipe.name!r} cannot be drawn without its trials"
            f" ({trials_text(recipe)}).",
            "Put the file of its trials beside it. Only pictures need the trials.",
        )
    by_rank = rates_by_rank(recipe)
    # Full finetuning is rank 0 in the trials, and comes last.
    ranks = sorted({*trials["rank"].tolist()}, key=lambda rank: rank or math.inf)
    # After trials at one rank, no other rank has a known alpha, and a panel of all ranks would be
    # empty.
    has_rates = len(by_rank) > 1
    figure, axes = _figure(len(ranks) + has_rates)
    curves = loss_curves(recipe)
    # The same learning rate is at the same place in every panel of a rank.
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
    """Return the trials as arrays: their rank (0 for full finetuning), learning rate, score, seed,
    and how they ended (a key of `MARKS`). The dict is empty for a recipe without trials.
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
    """Return the learning rates that the recipe knows, at the ranks tried and at powers of two."""
    ranks = sorted({*recipe.ranks, *_RANKS})
    rates = {rank: known_rate(recipe, rank) for rank in ranks}
    return {rank: rate for rank, rate in rates.items() if rate is not None}


def default_prediction(recipe: Recipe, rank: int | None) -> float | None:
    """Return the learning rate that the default law alone predicts at a rank from the recipe's at
    its reference, None for full finetuning.

    It is None at the reference, where there is nothing to predict, and after trials of full
    finetuning alone, which know no alpha. It is also None for a recipe with another law than µA,
    because such a recipe does not record the optimizer's family.
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
    """Return a figure and its panels, row by row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "Plots need matplotlib.",
            'In a clone of this package: pip install ".[plots]".',
        ) from error

    class Shown(Figure):
        """A figure that notebooks show. They show others only once pyplot is imported."""

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    columns = 2 if panels in (2, 4) else min(3, panels)
    rows = math.ceil(panels / columns)
    # A page shows a figure at some 8 inches of width, so wider ones have smaller letters there.
    width = {1: 7.0, 2: 9.0, 3: 11.0}[columns]
    size = (width, 1.3 + (3.7 if panels == 1 else 3.1) * rows)
    figure = Shown(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    return figure, axes


def _draw_trials(axis: Axes, trials: Trials) -> None:
    """Draw the trials of one rank.

    A score that is unknown, or far above the best, is drawn at the upper edge. Its true height
    would flatten all the others.
    """
    finite = trials["value"][np.isfinite(trials["value"])]
    best = finite.min() if len(finite) else 0.0
    above = finite[finite > best] - best
    far = 0.0
    if len(above):
        far = min(_FAR * float(np.median(above)), 1.1 * float(above.max()))
    height = max(1e-9, _LEAST * abs(best), far)
    # False for NaN, so that a run that was stopped early is drawn at the upper edge too.
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
    # a recipe does not say whether the loop returned a loss
    axis.set(ylabel="score, lower is better")
    axis.set_ylim(best - 0.15 * height, best + height)
    rate_axis(axis)


def _draw_curve(axis: Axes, curve: LossCurve | None) -> None:
    """Draw the fitted loss between the learning rates tried. Beyond them it is a guess."""
    if curve is None:
        return
    low, high = curve.tried
    x = np.linspace(low, high, 200)
    middle, bottom, top = curve.losses(x)
    lower, upper = axis.get_ylim()
    height = upper - lower
    lower = min(lower, float(middle.min()) - 0.1 * height)
    axis.set_ylim(lower, upper)
    # A curve far outside the frame would be written into an SVG all the same.
    bottom, top, middle = (
        np.clip(each, lower - height, upper + height) for each in (bottom, top, middle)
    )
    axis.fill_between(2.0**x, bottom, top, color=_BLUE, alpha=0.15, linewidth=0)
    axis.plot(2.0**x, middle, color=_BLUE, label="fitted loss, with its 90 % interval")


def _draw_rate(axis: Axes, rate: Rate | None) -> None:
    """Draw the recipe's learning rate, its interval and its ceiling."""
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
    """Draw the default law's prediction and the user's learning rate."""
    predicted = default_prediction(recipe, rank)
    if predicted is not None:
        label = f"predicted by the default law from rank {recipe.reference.rank}"
        axis.axvline(predicted, color=_GREEN, linestyle="-.", label=label)
    if lr is not None:
        axis.axvline(
            lr, color=_PURPLE, linewidth=2, label=f"your learning rate, {lr:.3g}"
        )


def _draw_end(axis: Axes, trials: Trials, end: str) -> None:
    """Mark a best learning rate that is the lowest or the highest one tried, by an arrow from its
    best trial outwards and a line in the title.
    """
    if not end:
        return
    at = trials["lr"].min() if end == "lowest" else trials["lr"].max()
    score = np.nanmin(trials["value"][trials["lr"] == at])
    factor = (
        0.6 if end == "lowest" else 1 / 0.6
    )  # length of the arrow on a logarithmic axis
    axis.annotate(
        "",
        xy=(at * factor, score),
        xytext=(at, score),
        arrowprops={"arrowstyle": "->", "color": INK},
        zorder=5,
    )
    axis.set_title(f"{axis.get_title()}: best at the {end} one tried", fontsize=11)


def _draw_rates(axis: Axes, recipe: Recipe, by_rank: dict[int, Rate]) -> None:
    """Draw the learning rate against the rank with its interval. The ranks tried are squares."""
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
    predicted[recipe.reference.rank or 0] = recipe.lr  # where both lines meet
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
    """Draw one legend for all panels, with each label once."""
    named: dict[str, Artist] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    # The kinds of trials first; a sort keeps the order of the rest.
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
    """Label whole decades only if a panel spans many, since the labels would overlap. Panels of
    ranks share their axis.
    """
    from matplotlib.ticker import LogLocator

    low, high = axis.get_xlim()
    if math.log10(high / low) > _MOST_DECADES:
        axis.xaxis.set_major_locator(LogLocator())


def rate_axis(axis: Axes, side: str = "x") -> None:
    """Make an axis, "x" or "y", one of learning rates: logarithmic, with ticks at 1 and 3."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(**{f"{side}scale": "log", f"{side}label": "learning rate, per step"})
    own = getattr(axis, f"{side}axis")
    own.set_major_locator(LogLocator(subs=(1, 3)))
    own.set_major_formatter(lambda value, _: f"{value:.6g}")
    own.set_minor_locator(NullLocator())
