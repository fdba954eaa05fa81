"""The figure of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._figures import COLOURS, figure_of, rate_axis, save, short
from .._printing import printable
from ..errors import PlotError
from ..recipe import Recipe, missing_trials
from ._picture import MARKS, SCORE, Picture, PictureArm, Span, picture_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE = "fit, lowest at the best rate"
_RATE = "the recipe's rate"
_FADED = 0.45  # opacity of what was not tried


def plot_recipe(recipe: Recipe, path: str | Path) -> Path:
    """Draw a recipe: one panel per rank with its trials, fit, band, ceiling and rate, and a panel
    of rates by rank.

    Args:
        recipe: the recipe.
        path: the file, a .png, .svg or .pdf.

    Returns:
        The path written.

    Raises:
        PlotError: matplotlib is not installed, the recipe has no trials, or the file cannot be
            written.
    """
    return save(recipe_figure(recipe), path)


def recipe_figure(recipe: Recipe) -> Figure:
    """Return the figure that `plot_recipe` writes."""
    picture = drawable(recipe)
    rooms = len(picture.arms) + bool(picture.by_rank)
    columns = 2 if rooms == 4 else min(3, rooms)
    rows = -(-rooms // columns)
    figure, axes = figure_of(columns, 1.0 + 3.6 * columns, 0.9 + 3.2 * rows, rows)
    axes = _filled(figure, axes, rooms, columns)
    _name_marks(axes[0], picture.marks(), COLOURS[0])
    axes[0].plot([], [], color=COLOURS[0], label=_CURVE)
    for axis, arm in zip(axes, picture.arms, strict=False):
        _draw_rank(axis, picture, arm)
    if picture.by_rank:
        _draw_rates(axes[-1], picture, recipe)
    for axis in axes[: len(picture.arms) : columns]:
        axis.set_ylabel(SCORE)
    made_by = (
        f"{recipe.optimizer.rsplit('.', 1)[-1]}, {recipe.steps or 'unknown'} steps"
    )
    title = printable(f"Recipe {short(recipe.name, 60)!r}: {made_by}")
    figure.suptitle(title, parse_math=False)
    drawn = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes)
    # once, of all panels
    each = {label: handle for pairs in drawn for handle, label in pairs}
    ncols = min(4, columns + 1)
    figure.legend(
        each.values(),
        each,
        loc="outside lower center",
        ncols=ncols,
        frameon=False,
        fontsize=9,
    )
    return figure


def _filled(figure: Any, axes: Any, rooms: int, columns: int) -> list[Any]:
    """Return the first `rooms` axes of a grid. The last one fills its row."""
    kept, rest = list(axes[:rooms]), axes[rooms:]
    if len(rest):
        for axis in (kept.pop(), *rest):
            axis.remove()
        row, column = divmod(rooms - 1, columns)
        kept.append(figure.add_subplot(axes[0].get_gridspec()[row, column:]))
    return kept


def drawable(recipe: Recipe) -> Picture:
    """Return the data of a recipe's figure. Raise a `PlotError` if it has no trials."""
    picture = picture_of(recipe)
    if recipe.missing:
        raise PlotError(
            missing_trials(recipe), "Copy it there too. The rates do not need it."
        )
    if not picture.arms:
        raise PlotError(
            f"The recipe {recipe.name!r} has no trials to draw.",
            "Give one made by ra.calibrate.",
        )
    return picture


def _draw_rank(axis: Any, picture: Picture, arm: PictureArm) -> None:
    """Draw one rank: trials, the fitted curve, and the recipe's rate with band and ceiling."""
    _draw_points(axis, arm, arm.values, COLOURS[0])
    if arm.rate is not None:
        axis.axvspan(
            arm.rate.low,
            arm.rate.high,
            color=COLOURS[0],
            alpha=0.12,
            lw=0,
            label="90 % band",
        )
        axis.axvline(arm.rate.lr, color=COLOURS[1], linestyle="--", label=_RATE)
        if arm.rate.ceiling is not None:
            axis.axvline(arm.rate.ceiling, color="0.2", linestyle=":", label="ceiling")
    rate_axis(axis)
    axis.set(xlim=picture.rates, ylim=arm.values)
    axis.set_title(arm.title, fontsize=10)


def _draw_points(axis: Any, arm: PictureArm, values: Span, colour: str) -> None:
    """Draw the curve, and the trials in a frame of scores."""
    if arm.curve:
        axis.plot(*zip(*arm.curve, strict=True), color=colour)
    for mark, places in arm.marks(values).items():
        axis.plot(*zip(*places, strict=True), **_style(mark, colour))


def _style(mark: str, colour: str) -> dict[str, Any]:
    """Return how trials that ended alike are drawn. Only those with their own score are filled."""
    inner = colour if mark == "finished" else "none"
    marker = dict(zip(MARKS, "o^xD", strict=True))[mark]
    style = {"linestyle": "", "marker": marker, "markerfacecolor": inner}
    return {**style, "color": colour, "alpha": 0.8}


def _name_marks(axis: Any, marks: dict[str, str], colour: str) -> None:
    """Add marks to the legend of an axis."""
    for mark, words in marks.items():
        axis.plot([], [], **_style(mark, colour), label=words)


def _draw_rates(axis: Any, picture: Picture, recipe: Recipe) -> None:
    """Draw the rate against rank with its band and ceiling, and that of full finetuning as a
    horizontal line. What was not tried is faded.
    """
    ranks, rates = zip(*picture.by_rank, strict=True)
    label = "a rank that was tried"
    for rank, rate in picture.by_rank:
        if rank not in recipe.ranks:
            continue
        axis.plot(rank, rate.lr, "s", color=COLOURS[1], label=label)
        axis.vlines(rank, rate.low, rate.high, color=COLOURS[1])
    band = {"color": COLOURS[0], "alpha": 0.12 * _FADED, "lw": 0}
    axis.fill_between(ranks, [r.low for r in rates], [r.high for r in rates], **band)
    faded = {"color": COLOURS[1], "linestyle": "--", "alpha": _FADED}
    axis.plot(ranks, [r.lr for r in rates], **faded, label="a rank that was not tried")
    if rates[0].ceiling is not None:
        ceiling = {"color": "0.2", "linestyle": ":", "alpha": _FADED}
        axis.plot(ranks, [r.ceiling for r in rates], **ceiling)
    if picture.full is not None:
        full, strength = picture.full, 1.0 if recipe.full_seen else _FADED
        axis.axhspan(full.low, full.high, color=COLOURS[2], alpha=0.12 * strength, lw=0)
        words = "full finetuning" + ("" if recipe.full_seen else ", not tried")
        style = {"color": COLOURS[2], "linestyle": "-.", "alpha": strength}
        axis.axhline(full.lr, **style, label=words)
    axis.set_xlabel("rank")
    axis.set_title("Rates by rank, with their 90 % band", fontsize=10)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    rate_axis(axis, "y")
