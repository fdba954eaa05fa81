"""Tests of a recipe's figure: its panels and marks, the learning rates at which trials are drawn, and errors on writing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rankaware_optim as ra
from rankaware_optim.cli import main
from rankaware_optim.errors import PlotError
from rankaware_optim.recipe import loss_curves
from rankaware_optim.reports import recipe_figure, report_html
from rankaware_optim.reports._figure import (
    MARKS,
    _draw_curve,
    default_prediction,
    rates_by_rank,
    trials_of,
)

from ..helpers.models import mlp
from ..helpers.recipes import KINDS, RECIPE

pytest.importorskip("matplotlib")


def calibrated(init, ranks, drift):
    """Return a recipe whose best learning rate depends on the rank, and the learning rates that its trials used."""
    used = []

    def train(trial):
        model = mlp((trial.rank, trial.rank) if trial.rank else (), init=init, width=32)
        groups = trial.optimizer(model).rates.groups
        role = "A" if trial.rank else "full"
        (rate,) = {group.lr for group in groups if group.role == role}
        used.append((trial.rank or 0, trial.seed, rate))
        u = math.log2(rate) + 7 - drift * math.log2((trial.rank or 32) / 8)
        for step in range(trial.steps):
            yield 2.0 - 1.5 * step / trial.steps * math.exp(-u * u / 8)

    options = {"lr_range": (2.0**-11, 2.0**-3), "seeds": (0, 1)}
    made = ra.calibrate(
        train, torch.optim.AdamW, ranks=ranks, steps=20, trials=8, **options
    )
    return made, used


@pytest.mark.parametrize("init", ["A", "B"])
def test_trials_stand_at_the_rates_they_ran_at(init):
    """A trial is drawn at the learning rate of its A matrices or full weights, and the panel of all ranks shows `Recipe.at`."""
    made, used = calibrated(init, (32, None, 2), 1.0)
    trials = trials_of(made)
    drawn = zip(trials["rank"], trials["seed"], trials["lr"], strict=True)
    for shown, ran in zip(sorted(drawn), sorted(used), strict=True):
        assert shown == pytest.approx(ran, rel=1e-6)
    rates = rates_by_rank(made)
    assert [*rates] == [2**e for e in range(11)]
    assert all(rates[rank].lr == made.at(rank=rank).lr for rank in (2, 32))


def test_a_sweeps_runs_stand_at_their_own_rates():
    """The figure of a sweep's recipe has the ranks, learning rates and losses of the sweep's rows as trials."""
    place = {"alpha": 16, "fan_in": 64}
    rows = [
        {"rank": r, "lr": 2.0**-x, "loss": (x - 8) ** 2 / 20 + 1, **place}
        for r in (4, 64)
        for x in (6, 7, 8, 9, 10)
    ]
    trials = trials_of(ra.sweeps.fit_sweep(rows))
    drawn = zip(trials["rank"], trials["lr"], trials["value"], strict=True)
    assert sorted(drawn) == sorted(tuple(row.values())[:3] for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_can_be_drawn(kind):
    """Each panel has content, every trial is a mark within its panel, and the ticks are where their labels say."""
    figure = recipe_figure(KINDS[kind])
    figure.draw_without_rendering()
    marks = 0
    for axis in figure.axes:
        assert axis.has_data()
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        for line in axis.get_lines():
            if line.get_marker() in tuple("oxD"):
                marks += len(line.get_xdata())
                assert all(left < x < right for x in line.get_xdata())
                assert all(bottom < y < top for y in line.get_ydata())
        for side in (axis.xaxis, axis.yaxis):
            if side.get_label_text() != "learning rate, per step":
                continue
            low, high = side.get_view_interval()
            ticks = zip(side.get_ticklocs(), side.get_ticklabels(), strict=True)
            seen = [(at, text.get_text()) for at, text in ticks if low <= at <= high]
            assert len(seen) > 1
            assert all(float(text) == pytest.approx(at, rel=1e-5) for at, text in seen)
    assert marks == len(KINDS[kind].tensors["lr"])


def lines_of(axis) -> dict[str, list[float]]:
    """Return the x values of each line of a panel, by the line's label."""
    return {line.get_label(): [*line.get_xdata()] for line in axis.get_lines()}


def test_one_rank_fills_the_figure():
    """A recipe of one rank has one panel with the trials, the fitted loss, the recipe's learning rate and the user's."""
    figure = KINDS["one rank"].plot(lr=5e-4)
    (axis,) = figure.axes
    lines = lines_of(axis)
    assert lines["your learning rate, 0.0005"] == [5e-4, 5e-4]
    (label,) = (label for label in lines if label.startswith("the recipe's"))
    assert lines[label][0] == pytest.approx(RECIPE.lr)
    curve = next(line for line in axis.get_lines() if "fitted" in line.get_label())
    interval, band = axis.collections[0], axis.patches[0]
    assert interval.get_alpha() < 0.5
    assert band.get_alpha() < 0.5
    heights = interval.get_paths()[0].vertices[:, 1]
    assert heights.min() < curve.get_ydata().min()
    at_best = np.interp(1e-3, curve.get_xdata(), curve.get_ydata())
    assert at_best == pytest.approx(0.5, abs=0.1)


def test_panels_of_ranks_share_their_learning_rates():
    """All panels of ranks have the same axis of learning rates, and the panel of full finetuning comes after them."""
    *ranks, every = recipe_figure(KINDS["full too"]).axes
    assert [axis.get_title().partition(":")[0] for axis in ranks] == [
        "Rank 4",
        "Rank 64",
        "Full finetuning",
    ]
    assert len({axis.get_xlim() for axis in ranks}) == 1
    assert every.get_title() == "All ranks"
    assert every.get_xlabel() == "rank"


def test_labels_do_not_overlap_over_many_decades():
    """If the learning rates of a narrow panel span many decades, only whole decades have labels."""
    far = KINDS["two ranks"].plot(lr=1e-7)
    near = KINDS["two ranks"].plot()
    for figure, steps in ((far, {1}), (near, {1, 3})):
        figure.draw_without_rendering()
        (low, high), ticks = figure.axes[0].get_xlim(), figure.axes[0].get_xticks()
        inside = [tick for tick in ticks if low <= tick <= high]
        assert len(figure.axes[0].get_xticks(minor=True)) == 0
        digits = {
            round(tick / 10 ** math.floor(math.log10(tick) + 1e-9)) for tick in inside
        }
        assert digits == steps


def test_a_score_far_above_the_best_is_drawn_at_the_upper_edge():
    """Very bad scores are drawn at the upper edge of the panel, so that the other scores remain distinguishable."""
    values = np.array([0.5, 0.4, math.inf, 0.6, 0.45, 50.0])
    tensors = {**RECIPE.tensors, "value": values, "rank": np.full(6, 4)}
    axis = recipe_figure(replace(RECIPE, tensors=tensors)).axes[0]
    bottom, top = axis.get_ylim()
    assert bottom < 0.4
    assert 0.6 < top < 2.0
    drawn = [
        y
        for line in axis.get_lines()
        if line.get_label().startswith("trial")
        for y in line.get_ydata()
    ]
    assert sum(y > 0.9 * top for y in drawn) == 2


def test_the_panel_of_all_ranks_has_the_rates_and_their_intervals():
    """In the panel of all ranks, a line shows the learning rates, squares the ranks tried, and an area the intervals."""
    axis = recipe_figure(RECIPE).axes[-1]
    lines = {line.get_label(): line for line in axis.get_lines()}
    (line,) = (each for label, each in lines.items() if "interval" in label)
    rates = rates_by_rank(RECIPE)
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == {
        rank: float(rate) for rank, rate in rates.items()
    }
    assert [*lines["a rank that was tried"].get_xdata()] == [4, 64]
    (area,) = axis.collections
    ends = {round(y, 9) for y in area.get_paths()[0].vertices[:, 1]}
    assert ends >= {
        round(end, 9) for rate in rates.values() for end in (rate.low, rate.high)
    }


@pytest.mark.parametrize("lr", [0, -1.0, math.nan, "fast"])
def test_an_impossible_rate_is_not_drawn(lr):
    """Passing an impossible learning rate to `plot` raises an error."""
    with pytest.raises(ra.RecipeError, match="learning rate to judge must be"):
        RECIPE.plot(lr)


def test_the_default_law_stands_beside_the_fit():
    """In every panel except the one of the reference's rank, a line shows the default law's prediction."""
    first, second, *_ = recipe_figure(RECIPE).axes
    at = replace(RECIPE.reference, rank=64, alpha=128)
    law = ra.laws.get_law("falling").bind(torch.optim.AdamW, {})
    predicted = RECIPE.lr * law.multiplier(at.as_factor(), RECIPE.reference)
    (label,) = (label for label in lines_of(second) if label.startswith("predicted"))
    assert lines_of(second)[label][0] == pytest.approx(predicted)
    assert label.endswith("from rank 4")
    (every,) = (
        line
        for line in recipe_figure(RECIPE).axes[-1].get_lines()
        if line.get_label() == label
    )
    by_rank = dict(zip(every.get_xdata(), every.get_ydata(), strict=True))
    assert by_rank[64] == pytest.approx(predicted)
    assert by_rank[4] == pytest.approx(RECIPE.lr)
    assert not any(label.startswith("predicted") for label in lines_of(first))


def test_the_default_laws_line_has_the_tokens_of_the_recipes_law():
    """The prediction of the default law is based on the µA law of the recipe, with its number of tokens."""
    mua = ra.MuA(tokens=64.0)
    recipe = replace(RECIPE, law=ra.Power(law=mua))
    at = replace(RECIPE.reference, rank=64, alpha=128).as_factor()
    law = ra.laws.Falling(law=mua)
    wanted = recipe.lr * law.multiplier(at, RECIPE.reference)
    assert default_prediction(recipe, 64) == pytest.approx(wanted)


def test_without_the_optimizers_family_nothing_is_predicted():
    """The figure of a recipe whose law is not µA has no line for the default law."""
    other = replace(RECIPE, law=ra.Power(law=ra.Constant()))
    labels = [label for axis in recipe_figure(other).axes for label in lines_of(axis)]
    assert not any(label.startswith("predicted") for label in labels)


def test_trials_of_full_finetuning_alone_predict_nothing():
    """A recipe of full finetuning alone has no prediction of the default law, because its trials have no alpha."""
    made = KINDS["full alone"]
    assert default_prediction(made, 8) is None
    assert default_prediction(made, None) is None


def test_full_finetuning_is_predicted_as_convert_lr_does():
    """At a large width, the figure predicts the same learning rate for full finetuning as `convert_lr`."""
    reference = ra.Reference(16, 32.0, fan_in=4096.0)
    made = replace(RECIPE, reference=reference, full_fan_in=4096.0)
    predicted = ra.convert_lr(
        made.lr, reference, ra.Reference(method="full", fan_in=4096.0)
    )
    assert default_prediction(made, None) == pytest.approx(float(predicted))


LOOKS = {
    "trial: finished": ("#0072B2", "None", "o"),
    "trial: diverged": ("#0072B2", "None", "x"),
    "fitted loss": ("#0072B2", "-", "None"),
    "the recipe's learning rate": ("#D55E00", "--", "None"),
    "ceiling": ("#333333", ":", "None"),
    "predicted by the default law": ("#009E73", "-.", "None"),
    "your learning rate": ("#CC79A7", "-", "None"),
    "a rank that was tried": ("#D55E00", "None", "s"),
}


def test_each_mark_looks_the_same_in_every_panel():
    """A mark has the same colour, line and marker in every panel, and no two marks look alike."""
    looks: dict[str, set] = {start: set() for start in LOOKS}
    for axis in RECIPE.plot(lr=5e-4).axes:
        for line in axis.get_lines():
            (start,) = (each for each in LOOKS if line.get_label().startswith(each))
            look = (line.get_color(), line.get_linestyle(), str(line.get_marker()))
            looks[start].add(look)
    assert looks == {start: {look} for start, look in LOOKS.items()}


def test_a_frame_is_widened_for_the_fitted_curve():
    """If the fitted curve falls below every trial, the axis of its panel is extended downwards to show it."""
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    axis.set_ylim(0.55, 0.75)
    _draw_curve(axis, loss_curves(RECIPE)[4])
    bottom, top = axis.get_ylim()
    assert bottom == pytest.approx(min(axis.get_lines()[0].get_ydata()) - 0.02)
    assert bottom < 0.55
    assert top == 0.75


@pytest.mark.parametrize(
    ("kind", "panels", "columns"),
    [("one rank", 1, 1), ("two ranks", 3, 3), ("full too", 4, 2)],
)
def test_a_panel_is_as_high_in_every_figure(kind, panels, columns):
    """Panels stand in one to three columns, and have about the same size in a figure of one panel as in one of four."""
    figure = recipe_figure(KINDS[kind])
    figure.draw_without_rendering()
    boxes = [axis.get_position() for axis in figure.axes]
    assert len(boxes) == panels
    assert len({round(box.x0, 2) for box in boxes}) == columns
    width, height = figure.get_size_inches()
    assert all(2.2 < box.width * width < 6.5 for box in boxes)
    assert all(2.2 < box.height * height < 4 for box in boxes)


def test_a_best_rate_at_an_end_is_marked():
    """If the best learning rate is the lowest or highest one tried, the figure, the page and the text say so."""
    recipe = ra.Recipe.load(Path(__file__).parents[2] / "recipes" / "language-a.toml")
    titles = [axis.get_title() for axis in recipe_figure(recipe).axes]
    assert "Full finetuning: best at the highest lr tried" in titles
    assert "Rank 192: best at the lowest lr tried" in titles
    assert "Rank 1" in titles
    for axis in recipe_figure(recipe).axes:
        arrows = [text for text in axis.texts if text.arrow_patch is not None]
        tried = [
            x
            for line in axis.get_lines()
            if line.get_marker() in tuple("oxD")
            for x in line.get_xdata()
        ]
        assert len(arrows) == axis.get_title().count(": best at the")
        for arrow in arrows:
            lowest = "lowest" in axis.get_title()
            assert arrow.xyann[0] == (min(tried) if lowest else max(tried))
            assert (arrow.xy[0] < arrow.xyann[0]) == lowest
    assert "tried; the best was the highest tried" in report_html(recipe)
    assert "full finetuning: the best learning rate is the highest" in str(recipe)


def test_the_command_draws_a_figure(tmp_path):
    """`rankaware plot` writes the figure of a recipe to a file and prints the path of the file."""
    recipe, out = RECIPE.save(tmp_path / "r.toml"), tmp_path / "figures" / "out.png"
    done = CliRunner().invoke(main, ["plot", str(recipe), "-o", str(out)])
    assert (done.exit_code, done.output) == (0, f"{out}\n")
    assert out.read_bytes().startswith(b"\x89PNG")
    judged = out.with_name("judged.svg")
    options = ["-o", str(judged), "--judge", "0.0005"]
    assert CliRunner().invoke(main, ["plot", str(recipe), *options]).exit_code == 0
    assert "your learning rate, 0.0005" in judged.read_text()


@pytest.mark.parametrize("name", ["out.unheard-of", "file/out.png", "out"])
def test_a_figure_that_cannot_be_written_is_said(name, tmp_path):
    """For an unknown or missing file format or an impossible path, `rankaware plot` prints one line and writes no file."""
    (tmp_path / "file").write_text("")
    recipe = RECIPE.save(tmp_path / "r.toml")
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(main, ["plot", str(recipe), "-o", str(tmp_path / name)])
    assert (done.exit_code, len(done.output.splitlines())) == (1, 1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    """If matplotlib is not installed, `plot` raises an error that names the extra to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"matplotlib.*\[plots\]"):
        RECIPE.plot()


def test_a_notebook_shows_a_plot_without_pyplot():
    """A notebook shows the figure of `recipe.plot()`, and pyplot is not imported."""
    code = (
        "import sys, matplotlib.figure\nfrom tests.helpers.recipes import RECIPE\n"
        "figure = RECIPE.plot()\nassert isinstance(figure, matplotlib.figure.Figure)\n"
        "print(figure._repr_png_()[1:4], 'matplotlib.pyplot' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, root])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["b'PNG'", "False"], done.stderr


def test_the_legend_names_every_mark_that_is_drawn():
    """Trials that finished, diverged or were stopped early have different marks, and the legend lists each mark once."""
    ended = {
        "rank": np.full(6, 4),
        "value": np.array([0.5, 0.4, math.inf, math.nan, 0.45, 9.0]),
        "diverged": np.arange(6) == 2,
        "pruned": np.arange(6) == 3,
    }
    figure = recipe_figure(replace(RECIPE, tensors={**RECIPE.tensors, **ended}))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(set(words)) == sorted(words)
    assert {*words} >= {f"trial: {end}" for end in MARKS}
    drawn = {line.get_marker() for axis in figure.axes for line in axis.get_lines()}
    assert drawn >= set("oxD")
