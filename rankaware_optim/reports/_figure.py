"""The figure of a recipe, drawn by matplotlib: all panels together, or each as SVG for a page.
matplotlib (the extra `plots`) is imported when one is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._printing import printable
from ..errors import PlotError
from ..recipe import Recipe, missing_trials
from ._picture import MARKS, SCORE, Picture, PictureArm, picture_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BLUE, _ORANGE, _GREEN = COLOURS[:3]
_INK = "#333333"
_FADED = 0.45  # opacity of what was not tried
_MARKERS = dict(zip(MARKS, "o^xD", strict=True))
_BAND: dict[str, Any] = {"alpha": 0.12, "linewidth": 0}
_RATE = {"color": _ORANGE, "linestyle": "--"}
_CEILING = {"color": _INK, "linestyle": ":"}
# The page's colours, which depend on its theme, by those that matplotlib writes.
_OF_PAGE = {
    _BLUE.lower(): "var(--blue)",
    _ORANGE.lower(): "var(--orange)",
    _GREEN.lower(): "var(--green)",
    _INK: "var(--ink)",
    "#000000": "var(--soft)",
}


def plot_recipe(recipe: Recipe, path: str | Path) -> Path:
    """Draw a recipe: one panel per rank with its trials, band, ceiling and rate, and a panel of
    rates by rank.

    Args:
        recipe: the recipe.
        path: the file, a .png, .svg or .pdf.

    Returns:
        The path written.

    Raises:
        PlotError: matplotlib is not installed, the recipe has no trials, or the file cannot be
            written.
    """
    target, figure = Path(path), recipe_figure(recipe)
    try:
        if not target.suffix:
            raise ValueError("its name has no suffix")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
    except (OSError, ValueError) as error:
        raise PlotError(
            f"The figure {target} cannot be written: {error}.",
            "Give a writable .png, .svg or .pdf.",
        ) from error
    return target


def recipe_figure(recipe: Recipe) -> Figure:
    """Return the figure that `plot_recipe` writes."""
    picture = picture_of(recipe)
    if not picture.arms:
        raise PlotError(
            missing_trials(recipe) or f"The recipe {recipe.name!r} has no trials.",
            "Give its trials for a picture; the rates do not need them.",
        )
    panels = len(picture.arms) + bool(picture.by_rank)
    columns = 2 if panels == 4 else min(3, panels)
    rows = -(-panels // columns)
    figure, axes = figure_of(columns, rows, 1.0 + 3.6 * columns, 0.9 + 3.2 * rows)
    for axis, arm in zip(axes, picture.arms, strict=False):
        draw_trials(axis, picture, arm)
        axis.set_title(arm.title, fontsize=10)
    if picture.by_rank:
        draw_rates(axes[panels - 1], picture)
        axes[panels - 1].set_title("Rates by rank, with their 90 % band", fontsize=10)
    for axis in axes[panels:]:
        axis.remove()
    optimizer = recipe.optimizer.rpartition(".")[2]
    title = f"{recipe.name[:60]}: {optimizer}, {recipe.steps or 'unknown'} steps"
    figure.suptitle(printable(title), parse_math=False)
    named: dict[str, Any] = {}
    for axis in axes[:panels]:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    place = {"loc": "outside lower center", "ncols": min(4, columns + 1)}
    figure.legend(named.values(), named, **place, frameon=False, fontsize=9)
    return figure


def draw_trials(axis: Any, picture: Picture, arm: PictureArm) -> None:
    """Draw one rank: its trials, and the recipe's rate with band and ceiling."""
    for mark, places in arm.marks().items():
        rates, scores = zip(*places, strict=True)
        axis.plot(
            rates,
            scores,
            label=MARKS[mark],
            color=_BLUE,
            alpha=0.8,
            linestyle="",
            marker=_MARKERS[mark],
            # only those with their own score are filled
            markerfacecolor=_BLUE if mark == "finished" else "none",
        )
    rate = arm.rate
    if rate is not None:
        axis.axvspan(rate.low, rate.high, color=_BLUE, **_BAND, label="90 % band")
        axis.axvline(rate.lr, **_RATE, label="the recipe's rate")
        if rate.ceiling is not None:
            axis.axvline(rate.ceiling, **_CEILING, label="ceiling")
    rate_axis(axis)
    axis.set(xlim=picture.rates, ylim=arm.scores, ylabel=SCORE)


def draw_rates(axis: Any, picture: Picture) -> None:
    """Draw the rate against rank with its band and ceiling, and that of full finetuning as a
    horizontal line. What was not tried is faded.
    """
    ranks, rates, _ = zip(*picture.by_rank, strict=True)
    for rank, rate, tried in picture.by_rank:
        if tried:
            axis.vlines(rank, rate.low, rate.high, color=_ORANGE)
            axis.plot(rank, rate.lr, "s", color=_ORANGE, label="a rank that was tried")
    axis.fill_between(
        ranks,
        [rate.low for rate in rates],
        [rate.high for rate in rates],
        color=_BLUE,
        **_BAND,
    )
    lrs = [rate.lr for rate in rates]
    axis.plot(ranks, lrs, **_RATE, alpha=_FADED, label="a rank that was not tried")
    if rates[0].ceiling is not None:
        ceilings = [rate.ceiling for rate in rates]
        axis.plot(ranks, ceilings, **_CEILING, alpha=_FADED)
    full = picture.full
    if full is not None:
        label, strength = "full finetuning", 1.0
        if not picture.full_tried:
            label, strength = "full finetuning, not tried", _FADED
        axis.axhspan(full.low, full.high, color=_GREEN, **_BAND)
        line = axis.axhline(full.lr, color=_GREEN, linestyle="-.", alpha=strength)
        line.set_label(label)
    axis.set_xlabel("rank")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    rate_axis(axis, "y")


def panel_svg(name: str, draw: Callable[..., None], *data: object) -> str:
    """Return what `draw` draws as an SVG element with the page's fonts and colours. name: the
    panel's, different from the page's others.
    """
    figure, [axis] = figure_of(1, 1, 3.7, 2.4)
    draw(axis, *data)
    axis.spines[["top", "right"]].set_visible(False)
    from matplotlib import rc_context

    file = StringIO()
    # the salt gives elements the same names in every run
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    for colour, of_page in _OF_PAGE.items():
        text = text.replace(colour, of_page)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # all panels have the same
    return text[text.index("<svg") :]


# --- matplotlib -----------------------------------------------------------------------------------


def figure_of(
    columns: int, rows: int, width: float, height: float
) -> tuple[Figure, Any]:
    """Return a figure and its axes, row by row. width, height: inches."""
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

    figure = Shown(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def rate_axis(axis: Any, side: str = "x") -> None:
    """Make an axis, "x" or "y", one of rates: logarithmic, with ticks at 1 and 3."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(**{f"{side}scale": "log", f"{side}label": "learning rate, per step"})
    own = getattr(axis, f"{side}axis")
    own.set_major_locator(LogLocator(subs=(1, 3)))
    own.set_major_formatter(lambda value, _: f"{value:.6g}")
    own.set_minor_locator(NullLocator())
