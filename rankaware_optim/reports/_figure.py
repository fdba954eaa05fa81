"""The figure of a recipe: a panel per rank with its trials, and a panel of rates by rank.

matplotlib (the extra `plots`) is imported when one is drawn.
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .._printing import printable
from .._rate import Rate
from ..errors import PlotError, RankAwareError
from ..recipe import Recipe, configuration, rate, trials_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Trials = dict[str, np.ndarray[Any, Any]]

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"
_BLUE, _ORANGE = COLOURS[:2]
_BAND: dict[str, Any] = {"alpha": 0.12, "linewidth": 0}
_RATE = {"color": _ORANGE, "linestyle": "--"}
_CEILING = {"color": INK, "linestyle": ":"}
# How a trial ended, in the legend, and its marker.
MARKS = {"finished": "o", "diverged": "x", "pruned": "D"}
# The frames, by hand.
_FAR = 2.2  # times the median above the best: scores farther off are not in the frame
_LEAST = 1e-3  # of the best score: a frame is as high, so that noise does not look like a bowl
_RANKS = {2**power for power in range(11)}  # at which rates by rank are drawn


def recipe_figure(recipe: Recipe) -> Figure:
    """Return a figure: one panel per rank with its trials, band, ceiling and rate, and a panel of
    rates by rank. Its `savefig(path)` writes it.

    Raises:
        PlotError: matplotlib is not installed, or the recipe has no trials.
    """
    trials = trials_of(recipe)
    if not trials:
        raise PlotError(
            f"The recipe {recipe.name!r} cannot be drawn: {trials_text(recipe)}.",
            "Give its trials for a picture; the rates do not need them.",
        )
    by_rank = rates_by_rank(recipe)
    ranks = sorted({*trials["rank"].tolist()}, key=lambda rank: rank or math.inf)
    figure, axes = _figure(len(ranks) + bool(by_rank))
    for axis in axes[1 : len(ranks)]:
        axis.sharex(axes[0])
    for axis, rank in zip(axes, ranks, strict=False):
        of_rank = trials["rank"] == rank
        _draw_trials(axis, {name: each[of_rank] for name, each in trials.items()})
        _draw_rate(axis, known_rate(recipe, rank))
        axis.set_title(f"Rank {rank}" if rank else "Full finetuning", fontsize=10)
    if by_rank:
        _draw_rates(axes[-1], recipe, by_rank)
    figure.suptitle(printable(recipe.name[:60]), parse_math=False)
    named: dict[str, Any] = {}
    for axis in axes:  # one legend for all panels, in which each word stands once
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3}
    figure.legend([*named.values()], [*named], **place, frameon=False, fontsize=9)
    return figure


# --- what is drawn --------------------------------------------------------------------------------


def trials_of(recipe: Recipe) -> Trials:
    """Return the trials as arrays: their rank (0 for full finetuning), rate, score, seed, and how
    they ended (a key of `MARKS`). It is empty if the recipe has none.
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
        "end": np.where(tensors.get("pruned", False), "pruned", end),
    }


def known_rate(recipe: Recipe, rank: int) -> Rate | None:
    """Return the rate at a rank, 0 for full finetuning, or None if the recipe needs more for it,
    such as alpha.
    """
    try:
        if rank:
            return rate(recipe, configuration(recipe, rank))
        return rate(recipe, configuration(recipe, method="full"))
    except RankAwareError:
        return None


def rates_by_rank(recipe: Recipe) -> dict[int, Rate]:
    """Return the rates that are known at the ranks tried and at powers of two."""
    ranks = sorted({*recipe.ranks, *_RANKS})
    rates = {rank: known_rate(recipe, rank) for rank in ranks}
    return {rank: rate for rank, rate in rates.items() if rate is not None}


# --- matplotlib -----------------------------------------------------------------------------------


def _figure(panels: int) -> tuple[Figure, Any]:
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

    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    size = (1.0 + 3.6 * columns, 0.9 + 3.2 * rows)
    figure = Shown(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    return figure, axes


def _draw_trials(axis: Any, trials: Trials) -> None:
    """Draw the trials of one rank. A score that is unknown or far above the best is drawn at the
    upper edge of the frame, since it would flatten the others.
    """
    finite = trials["value"][np.isfinite(trials["value"])]
    best = finite.min() if len(finite) else 0.0
    above = finite[finite > best] - best
    far = _FAR * np.median(above) if len(above) else 0.0
    height = max(1e-9, _LEAST * abs(best), far)
    inside = np.abs(trials["value"] - best) <= height
    heights = np.where(inside, trials["value"], best + 0.97 * height)
    for end, marker in MARKS.items():
        drawn = trials["end"] == end
        if drawn.any():
            mark = {"color": _BLUE, "marker": marker, "fillstyle": "none"}
            at = trials["lr"][drawn], heights[drawn]
            axis.plot(*at, label=end, linestyle="", **mark)
    # a recipe does not say whether what the loop returned was a loss
    axis.set(ylim=(best - 0.1 * height, best + height), ylabel="score, lower is better")
    rate_axis(axis)


def _draw_rate(axis: Any, rate: Rate | None) -> None:
    if rate is None:
        return
    axis.axvspan(rate.low, rate.high, color=_BLUE, **_BAND, label="90 % band")
    axis.axvline(rate.lr, **_RATE, label="the recipe's rate")
    if rate.ceiling is not None:
        axis.axvline(rate.ceiling, **_CEILING, label="ceiling")


def _draw_rates(axis: Any, recipe: Recipe, by_rank: dict[int, Rate]) -> None:
    """Draw the rate against rank with its band. The ranks tried are squares."""
    ranks = np.array([*by_rank])
    rows = [(rate.low, rate.lr, rate.high) for rate in by_rank.values()]
    low, lr, high = np.array(rows).T
    tried = np.isin(ranks, recipe.ranks)
    axis.fill_between(ranks, low, high, color=_BLUE, **_BAND)
    axis.plot(ranks, lr, **_RATE, label="the recipe's rate")
    squares = {"color": _ORANGE, "marker": "s", "linestyle": ""}
    axis.plot(ranks[tried], lr[tried], **squares, label="a rank that was tried")
    axis.set_xlabel("rank")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_title("Rates by rank, with their 90 % band", fontsize=10)
    rate_axis(axis, "y")


def rate_axis(axis: Any, side: str = "x") -> None:
    """Make an axis, "x" or "y", one of rates: logarithmic, with ticks at 1 and 3."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(**{f"{side}scale": "log", f"{side}label": "learning rate, per step"})
    own = getattr(axis, f"{side}axis")
    own.set_major_locator(LogLocator(subs=(1, 3)))
    own.set_major_formatter(lambda value, _: f"{value:.6g}")
    own.set_minor_locator(NullLocator())
