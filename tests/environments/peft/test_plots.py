"""Figures: every kind of recipe can be drawn, and what cannot be written is said."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rankaware_optim import RankAwareError
from rankaware_optim.cli._main import main

pytest.importorskip("matplotlib")

from rankaware_optim.errors import PlotError
from rankaware_optim.reports import _figure, plot_recipe
from rankaware_optim.reports._picture import MARKS, picture_of

from ...helpers.recipes import KINDS, RECIPE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_recipe_can_be_drawn(kind, suffix, tmp_path):
    """Whatever was calibrated, a figure is written where it was asked for, without a warning."""
    path = plot_recipe(KINDS[kind], tmp_path / "figures" / f"out.{suffix}")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["out.unheard-of", "file/out.png"])
def test_a_figure_that_cannot_be_written_is_said(name, tmp_path):
    """An unknown format or a place that is no folder is an error of ours."""
    (tmp_path / "file").write_text("")
    with pytest.raises(PlotError, match="cannot be written"):
        plot_recipe(RECIPE, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_figure_without_a_suffix_is_refused(tmp_path):
    """It would be written under another name than the one given."""
    path = RECIPE.save(tmp_path / "made.toml")
    before = sorted(tmp_path.iterdir())
    assert (
        "no suffix"
        in CliRunner()
        .invoke(main, ["plot", str(path), "-o", str(tmp_path / "made")])
        .stderr
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_recipe_without_trials_is_refused(tmp_path):
    """Without its trials' tensors there is nothing to draw."""
    empty = replace(RECIPE, tensors={})
    for draw in (empty.plot, lambda: plot_recipe(empty, tmp_path / "out.png")):
        with pytest.raises(RankAwareError, match="trial"):
            draw()


def test_a_notebook_shows_a_plot_without_pyplot():
    """`recipe.plot()` returns a figure of matplotlib that is a picture by itself, and leaves no state of pyplot."""
    code = (
        "import sys, matplotlib.figure\nfrom tests.helpers.recipes import RECIPE\n"
        "figure = RECIPE.plot()\nassert isinstance(figure, matplotlib.figure.Figure)\n"
        "print(figure._repr_png_()[1:4], 'matplotlib.pyplot' in sys.modules)"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, root])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["b'PNG'", "False"], done.stderr


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    """The error of `recipe.plot()` names the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"matplotlib.*\[plots\]"):
        RECIPE.plot()


def figures(monkeypatch, module) -> list:
    """The figures that are saved from now on, as matplotlib holds them."""
    saved = []
    monkeypatch.setattr(module, "save", lambda figure, path: saved.append(figure))
    return saved


@pytest.mark.parametrize("kind", KINDS)
def test_a_tick_stands_where_its_label_says(kind, monkeypatch):
    """Every label of an axis of rates reads as the number at which its tick stands."""
    saved = figures(monkeypatch, _figure)
    plot_recipe(KINDS[kind], "out.png")
    saved[0].draw_without_rendering()
    for axis in saved[0].axes:
        sides = [
            one
            for one in (axis.xaxis, axis.yaxis)
            if one.get_label_text() == "learning rate, per step"
        ]
        assert sides
        for side in sides:
            pairs = [
                (tick, text.get_text())
                for tick, text in zip(
                    side.get_ticklocs(), side.get_ticklabels(), strict=True
                )
            ]
            assert pairs
            assert all(
                float(label) == pytest.approx(tick, rel=1e-9) for tick, label in pairs
            )


@pytest.mark.parametrize("kind", KINDS)
def test_every_panel_is_used(kind, monkeypatch):
    """Each panel holds something, rows end at the right edge, and every trial is a mark within its panel."""
    saved = figures(monkeypatch, _figure)
    plot_recipe(KINDS[kind], "out.png")
    saved[0].draw_without_rendering()
    assert all(axis.has_data() and axis.axison for axis in saved[0].axes)
    ends = {}
    for axis in saved[0].axes:
        spec = axis.get_subplotspec()
        ends[spec.rowspan.start] = max(
            ends.get(spec.rowspan.start, 0), spec.colspan.stop
        )
    assert set(ends.values()) == {saved[0].axes[0].get_gridspec().ncols}
    marks = 0
    for axis, _ in zip(saved[0].axes, picture_of(KINDS[kind]).arms, strict=False):
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        for line in (
            line for line in axis.get_lines() if line.get_marker() in tuple("o^xD")
        ):
            marks += len(line.get_xdata())
            assert all(left < x < right for x in line.get_xdata())
            assert all(bottom < y < top for y in line.get_ydata())
    assert marks == len(KINDS[kind].tensors["lr"])


def test_the_legend_names_every_mark_that_is_drawn(monkeypatch):
    """Trials that ended in four ways have four marks, each once in the legend."""
    ended = {
        "rank": np.full(6, 4),
        "value": np.array([0.5, 0.4, math.inf, math.nan, 0.45, 9.0]),
        "diverged": np.arange(6) == 2,
        "pruned": np.arange(6) == 3,
    }
    saved = figures(monkeypatch, _figure)
    plot_recipe(replace(RECIPE, tensors={**RECIPE.tensors, **ended}), "out.png")
    words = [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert words[:4] == list(MARKS.values())
    drawn = {line.get_marker() for axis in saved[0].axes for line in axis.get_lines()}
    assert drawn >= set("o^xD")


@pytest.mark.parametrize("kind", ["two ranks", "full too"])
def test_what_was_not_tried_is_faded(kind, monkeypatch):
    """Among rates by rank only the ranks tried are strong, and full finetuning where it was tried."""
    saved = figures(monkeypatch, _figure)
    plot_recipe(KINDS[kind], "out.png")
    strong = {
        line.get_label(): line.get_alpha() in (None, 1.0)
        for line in saved[0].axes[-1].get_lines()
        if not line.get_label().startswith("_")
    }
    tried = KINDS[kind].full_seen
    assert strong == {
        "a rank that was tried": True,
        "a rank that was not tried": False,
        "full finetuning" if tried else "full finetuning, not tried": tried,
    }
