"""The figure of a recipe."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from .._figures import COLOURS, figure_of, rate_axis, save, short
from .._printing import printable
from ..errors import PlotError
from ..recipe import Recipe, missing_trials
from ._picture import Picture, PictureArm, picture_of

_CURVE = "fit, lowest at the best rate"
_BEYOND = "off the frame, diverged or pruned"


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
    picture = drawable(recipe)
    rooms = len(picture.arms) + bool(picture.by_rank)
    columns = 2 if rooms == 4 else min(3, rooms)
    rows = -(-rooms // columns)
    figure, axes = figure_of(columns, 1.0 + 3.6 * columns, 0.9 + 3.2 * rows, rows)
    axes = _filled(figure, axes, rooms, columns)
    for axis, arm in zip(axes, picture.arms, strict=False):
        _draw_rank(axis, picture, arm)
    if picture.by_rank:
        _draw_rates(axes[-1], picture, recipe)
    for axis in axes[: len(picture.arms) : columns]:
        axis.set_ylabel("score, minimised")
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
    return save(figure, path)


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
    _draw_points(axis, arm, arm.values, COLOURS[0], "trial")
    if arm.rate is not None:
        axis.axvspan(
            arm.rate.low,
            arm.rate.high,
            color=COLOURS[0],
            alpha=0.12,
            lw=0,
            label="90 % band",
        )
        axis.axvline(
            arm.rate.lr, color=COLOURS[1], linestyle="--", label="the recipe's rate"
        )
        if arm.rate.ceiling is not None:
            axis.axvline(arm.rate.ceiling, color="0.2", linestyle=":", label="ceiling")
    rate_axis(axis)
    axis.set(xlim=picture.rates, ylim=arm.values)
    axis.set_title(arm.title, fontsize=10)


def _draw_points(
    axis: Any, arm: PictureArm, values: tuple[float, float], colour: str, label: str
) -> None:
    """Draw trials at their rates, those outside the frame as open triangles at the upper edge, and
    the curve.
    """
    bottom, top = values
    edge = top - 0.03 * (top - bottom)
    inside = [(p.rate, p.value) for p in arm.points if p.value <= top]
    beyond = [p.rate for p in arm.points if not p.value <= top]
    curve = zip(*arm.curve, strict=True) if arm.curve else ((), ())
    alone = label == "trial"
    axis.plot(*curve, color=colour, linewidth=1.5, label=_CURVE if alone else None)
    axis.plot(
        *zip(*inside, strict=True) if inside else ((), ()),
        "o",
        color=colour,
        label=label,
        alpha=0.8,
    )
    off = {
        "color": colour,
        "markerfacecolor": "none",
        "label": _BEYOND if alone and beyond else None,
    }
    axis.plot(beyond, [edge] * len(beyond), "^", **off)


def draw_trials(axis: Any, picture: Picture) -> None:
    """Draw all ranks in one panel."""
    for arm, colour in zip(picture.arms, cycle(COLOURS), strict=False):
        _draw_points(axis, arm, picture.values, colour, arm.label)
        if arm.rate is not None:
            axis.axvline(arm.rate.lr, color=colour, linestyle="--", linewidth=1)
    rate_axis(axis)
    axis.set(ylabel="score, minimised", xlim=picture.rates, ylim=picture.values)
    axis.set_title("Trials (△ off the frame; dashed: quoted rates)", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _draw_rates(axis: Any, picture: Picture, recipe: Recipe) -> None:
    """Draw the rate against rank with its band and ceiling, and that of full finetuning as a
    horizontal line.
    """
    ranks, rates = zip(*picture.by_rank, strict=True)
    axis.fill_between(
        ranks,
        [r.low for r in rates],
        [r.high for r in rates],
        color=COLOURS[0],
        alpha=0.12,
        lw=0,
    )
    axis.plot(ranks, [r.lr for r in rates], color=COLOURS[1], linestyle="--")
    if rates[0].ceiling is not None:
        axis.plot(ranks, [r.ceiling for r in rates], color="0.2", linestyle=":")
    if picture.full is not None:
        axis.axhspan(
            picture.full.low, picture.full.high, color=COLOURS[2], alpha=0.12, lw=0
        )
        axis.axhline(
            picture.full.lr, color=COLOURS[2], linestyle="-.", label="full finetuning"
        )
    for rank in recipe.ranks:
        axis.axvline(rank, color="0.8", linewidth=0.8, zorder=0)
    axis.set_xlabel("rank (grey: calibrated)")
    axis.set_title("Rates by rank", fontsize=10)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    rate_axis(axis, "y")
