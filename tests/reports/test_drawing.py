"""Tests that figures are drawn as before: a golden file lists every line, colour, marker, label and limit.

After an intended change, this command writes the golden file again, and its diff shows what changed in the figures:

    tox run -e integrations -- tests/reports/test_drawing.py --write-golden
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankaware_optim.reports import recipe_figure

from ..helpers.recipes import KINDS

pytest.importorskip("matplotlib")

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

FILE = Path(__file__).parents[1] / "golden" / "drawing.txt"
# Together, the figures of these recipes have every panel, marker and line that a figure can contain.
DRAWN = ("two ranks", "full and one rank", "scores below zero")


def short(values) -> str:
    """Return the numbers with three digits each. Of a long array, return only the first, middle and last number."""
    values = np.atleast_1d(np.asarray(values, float))
    if len(values) > 12:
        values = values[[0, len(values) // 2, -1]]
    return " ".join(f"{value:.3g}" for value in values)


def line(artist: Line2D) -> str:
    """Return a description of a line, or of the markers of some trials."""
    style = (
        artist.get_linestyle(),
        artist.get_marker(),
        artist.get_fillstyle(),
        to_hex(artist.get_color()),
    )
    size = short([artist.get_linewidth(), artist.get_zorder()])
    where = f"x {short(artist.get_xdata())}, y {short(artist.get_ydata())}"
    return f"line {' '.join(style)} {size} {artist.get_label()!r}: {where}"


def area(artist: Collection) -> str:
    """Return a description of an area, such as the interval of a fitted curve."""
    [color] = artist.get_facecolor()
    edges = artist.get_paths()[0].get_extents().extents
    width = short(artist.get_linewidth())
    return f"area {to_hex(color, keep_alpha=True)} {width}: {short(edges)}"


def described(artist: Artist) -> str:
    """Return a description of an artist in one line, or "" for an artist that our figures do not style."""
    if isinstance(artist, Line2D):
        return line(artist)
    if isinstance(artist, Collection):
        return area(artist)
    if isinstance(artist, Annotation):
        style = " ".join(map(str, artist.arrowprops.values()))
        ends = f"{short(artist.xyann)} to {short(artist.xy)}"
        return f"arrow {style} {artist.get_zorder()}: {ends}"
    if isinstance(artist, Rectangle):
        color = to_hex(artist.get_facecolor(), keep_alpha=True)
        width = short(artist.get_linewidth())
        return f"span {color} {width}: {short(artist.get_bbox().extents)}"
    if isinstance(artist, Text) and artist.get_text():
        return f"text {artist.get_fontsize():g} {artist.get_text()!r}"
    return ""


def panel(axis: Axes) -> list[str]:
    """Return a description of a panel: its axes, its ticks and every artist in it."""
    lines = [f"panel {axis.get_title()!r}"]
    for side in (axis.xaxis, axis.yaxis):
        low, high = side.get_view_interval()
        ticks = zip(side.get_ticklocs(), side.get_ticklabels(), strict=True)
        shown = [text.get_text() for at, text in ticks if low <= at <= high]
        lines.append(
            f"  {side.axis_name} {side.get_scale()} {side.get_label_text()!r}"
            f" {short([low, high])}, ticks {' '.join(shown)}"
        )
    drawn = [
        described(artist) for artist in axis.get_children() if artist is not axis.patch
    ]
    return [*lines, *(f"  {each}" for each in drawn if each)]


def drawing(kind: str) -> str:
    """Return a description of the figure of a recipe."""
    figure = recipe_figure(KINDS[kind], lr=2e-3)
    figure.draw_without_rendering()
    [legend] = figure.legends
    names = [
        f"  {text.get_fontsize():g} {text.get_text()!r}" for text in legend.get_texts()
    ]
    frame = "framed" if legend.get_frame_on() else "without a frame"
    lines = [
        f"# {kind}: {short(figure.get_size_inches())} inches",
        f"title {figure._suptitle.get_fontsize():g} {figure.get_suptitle()!r}",
        *(each for axis in figure.axes for each in panel(axis)),
        f"legend {frame}, {legend._ncols} columns",
        *names,
    ]
    return "\n".join(lines) + "\n"


def test_a_figure_is_drawn_as_before(request: pytest.FixtureRequest) -> None:
    """Every line, area, arrow, label, colour and limit of three figures is the same as in the golden file."""
    now = "\n".join(map(drawing, DRAWN))
    if request.config.getoption("--write-golden"):
        FILE.write_text(now, encoding="utf-8")
    assert now == FILE.read_text(encoding="utf-8")
