"""Figures, by matplotlib (the extra `plots`), imported when one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .errors import RankAwareError
from .picture import Arm as PictureArm
from .picture import Picture, picture_of
from .recipe import Recipe

if TYPE_CHECKING:
    from .coordinate import CoordinateCheck, CoordinateRow
    from .demo import Arm

__all__ = ["plot_coordinates", "plot_recipe", "plot_transfer"]

# Okabe and Ito's colours, told apart by readers of every colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Of a coordinate check: field, label and marker.
_SIZES = (
    ("from_b", "s·ΔB·A₀·x", "o"),
    ("from_a", "s·B₀·ΔA·x", "s"),
    ("from_both", "s·ΔB·ΔA·x", "^"),
    ("inner", "inner features A·x", "D"),
)
_MOST_PANELS = 4


class PlotError(RankAwareError):
    """matplotlib is not installed, or the file cannot be written."""


def plot_recipe(recipe: Recipe, path: str | Path) -> Path:
    """Draw a recipe: a panel a rank with its trials, the fit, band, ceiling and rate; then the rates by rank.

    Returns the path written. Raises PlotError where matplotlib is missing or the file cannot be written.
    """
    picture = _picture(recipe)
    rooms = len(picture.arms) + bool(picture.by_rank)
    columns = min(3, rooms)
    rows = -(-rooms // columns)
    figure, axes = _figure(columns, 1.0 + 3.6 * columns, 0.9 + 3.2 * rows, rows)
    for axis, arm in zip(axes, picture.arms, strict=False):
        _draw_rank(axis, picture, arm)
    if picture.by_rank:
        _draw_rates(axes[rooms - 1], picture, recipe)
    for axis in axes[rooms:]:
        axis.set_axis_off()
    axes[0].set_ylabel("score, minimised")
    made_by = f"{recipe.optimizer.rsplit('.', 1)[-1]}, {recipe.steps or 'untold'} steps"
    figure.suptitle(f"Recipe {_short(recipe.name, 60)!r}: {made_by}", parse_math=False)
    figure.legend(*_legend(axes), loc="outside lower center", ncols=min(4, 2 * columns), frameon=False, fontsize=9)
    return _save(figure, path)


def plot_transfer(recipe: Recipe, arms: Sequence[Arm], factors: Sequence[float], path: str | Path) -> Path:
    """Draw the demo's check: held-out loss around the recipe's rate at configurations it never saw."""
    figure, axes = _figure(1 + len(arms), 5.2 * (1 + len(arms)))
    _draw_trials(axes[0], _picture(recipe))
    for axis, arm in zip(axes[1:], arms, strict=True):
        _draw_arm(axis, arm, factors)
    return _save(figure, path)


def plot_coordinates(check: CoordinateCheck, path: str | Path) -> Path:
    """Draw a coordinate check: sizes (rms) against rank, a panel a layer, the flat line being what does not change.

    Of more than four layers, those whose change goes most with the rank are drawn. A term that is zero at every rank
    is named as such. Returns the path written. Raises PlotError where matplotlib is missing or the file cannot be
    written.
    """
    worst = sorted(check.slopes, key=lambda pair: -abs(pair[1]))[:_MOST_PANELS]
    drawn = [pair for pair in check.slopes if pair in worst]
    width = max(7.0, 3.8 * len(drawn))
    figure, axes = _figure(len(drawn), width, height=5.0, sharey=True)
    for axis, (layer, slope) in zip(axes, drawn, strict=True):
        _draw_sizes(axis, sorted((row for row in check.rows if row.layer == layer), key=lambda row: row.rank))
        axis.set_title(f"{_short(layer)}: r^{slope:+.2f}", fontsize=10, parse_math=False)
    axes[0].set_ylabel("rms per entry")
    figure.suptitle(fill(check.sentence, int(13 * width)), fontsize=10, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if width < 11 else 6, frameon=False, fontsize=9)
    return _save(figure, path)


def _figure(columns: int, width: float, height: float = 4.2, rows: int = 1, sharey: bool = False) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("Plots need matplotlib.", 'Install it by pip install "rankaware-optim[plots]".') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()


def _picture(recipe: Recipe) -> Picture:
    picture = picture_of(recipe)
    if not picture.arms:
        raise PlotError(f"The recipe {recipe.name!r} holds no trials to draw.", "Give one made by ra.calibrate.")
    return picture


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels, each label once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def _draw_rank(axis: Any, picture: Picture, arm: PictureArm) -> None:
    """One rank: trials, the fitted curve, and the recipe's rate with band and ceiling."""
    _draw_points(axis, picture, arm, _COLOURS[0], "trial")
    if arm.rate is not None:
        axis.axvspan(arm.rate.low, arm.rate.high, color=_COLOURS[0], alpha=0.12, lw=0, label="90 % band")
        axis.axvline(arm.rate.lr, color=_COLOURS[1], linestyle="--", label="the recipe's rate")
        if arm.rate.ceiling is not None:
            axis.axvline(arm.rate.ceiling, color="0.2", linestyle=":", label="ceiling")
    _rate_axis(axis)
    axis.set(xlim=picture.rates, ylim=picture.values)
    axis.set_title(f"{arm.label[0].upper()}{arm.label[1:]}", fontsize=10)


def _draw_points(axis: Any, picture: Picture, arm: PictureArm, colour: str, label: str) -> None:
    """Trials at the rates they ran at, those without a place as open triangles at the upper edge, and the curve."""
    bottom, top = picture.values
    edge = top - 0.03 * (top - bottom)
    inside = [(p.rate, p.value) for p in arm.points if p.value <= top]
    beyond = [p.rate for p in arm.points if not p.value <= top]
    curve = zip(*arm.curve, strict=True) if arm.curve else ((), ())
    axis.plot(*curve, color=colour, linewidth=1.5, label="fit" if label == "trial" else None)
    axis.plot(*zip(*inside, strict=True) if inside else ((), ()), "o", color=colour, label=label, alpha=0.8)
    axis.plot(beyond, [edge] * len(beyond), "^", color=colour, markerfacecolor="none")


def _draw_trials(axis: Any, picture: Picture) -> None:
    """All ranks in one panel."""
    for arm, colour in zip(picture.arms, cycle(_COLOURS), strict=False):
        _draw_points(axis, picture, arm, colour, arm.label)
        if arm.rate is not None:
            axis.axvline(arm.rate.lr, color=colour, linestyle="--", linewidth=1)
    _rate_axis(axis)
    axis.set(ylabel="score, minimised", xlim=picture.rates, ylim=picture.values)
    axis.set_title("Trials (△ off the frame; dashed: quoted rates)", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _draw_rates(axis: Any, picture: Picture, recipe: Recipe) -> None:
    """The rate against rank, with its band and ceiling, and full finetuning's as a level."""
    ranks, rates = zip(*picture.by_rank, strict=True)
    axis.fill_between(ranks, [r.low for r in rates], [r.high for r in rates], color=_COLOURS[0], alpha=0.12, lw=0)
    axis.plot(ranks, [r.lr for r in rates], color=_COLOURS[1], linestyle="--")
    if rates[0].ceiling is not None:
        axis.plot(ranks, [r.ceiling for r in rates], color="0.2", linestyle=":")
    if picture.full is not None:
        axis.axhspan(picture.full.low, picture.full.high, color=_COLOURS[2], alpha=0.12, lw=0)
        axis.axhline(picture.full.lr, color=_COLOURS[2], linestyle="-.", label="full finetuning")
    for rank in recipe.ranks:
        axis.axvline(rank, color="0.8", linewidth=0.8, zorder=0)
    axis.set_xlabel("rank (grey: calibrated)")
    axis.set_ylabel("learning rate, per step")
    axis.set_title("Rates by rank", fontsize=10)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_yscale("log")


def _draw_arm(axis: Any, arm: Arm, factors: Sequence[float]) -> None:
    rates = [arm.rate.lr * f for f in factors]
    axis.axvspan(arm.rate.low, arm.rate.high, color=_COLOURS[0], alpha=0.12, lw=0, label="90 % band")
    for seed, losses in enumerate(zip(*arm.losses, strict=True)):
        axis.plot(rates, losses, "o", color="0.6", markersize=4, label="each seed" if seed == 0 else None)
    axis.plot(rates, arm.means, "o-", color=_COLOURS[0], label="mean")
    axis.axvline(arm.rate.lr, color=_COLOURS[1], linestyle="--", label="the recipe's rate")
    axis.axhline(arm.start, color="0.8", linewidth=0.8, label="before training")
    _rate_axis(axis)
    axis.set(ylabel="held-out loss, nats", ylim=(0.9 * min(map(min, arm.losses)), 1.1 * arm.start))
    axis.set_title(f"Checked: {arm.label}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _draw_sizes(axis: Any, rows: Sequence[CoordinateRow]) -> None:
    ranks = [row.rank for row in rows]
    for (field, label, marker), colour in zip(_SIZES, _COLOURS[1:], strict=False):
        sizes = [getattr(row, field) for row in rows]
        shown = (ranks, sizes) if any(sizes) else ((), ())
        axis.plot(*shown, marker=marker, color=colour, linewidth=1, label=label if any(sizes) else f"{label}: zero")
    axis.plot(ranks, [row.change for row in rows], "o-", color=_COLOURS[0], linewidth=2.5, label="whole change")
    axis.axhline(rows[0].change, color="0.5", linestyle="--", linewidth=1, zorder=0, label="flat, as wanted")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}")
    axis.set_xlabel("rank")


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _rate_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=4))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.1g}")
    axis.set_xlabel("learning rate, per step")


def _save(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
    except (OSError, ValueError) as error:
        raise PlotError(
            f"The figure {target} cannot be written: {error}.", "Give a writable .png, .svg or .pdf."
        ) from error
    return target
