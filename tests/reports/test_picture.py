"""What a picture of a recipe shows: trials where they ran, each once, in frames that hold them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rankaware_optim as ra
from rankaware_optim.reports._picture import MARKS, PictureArm, Point, picture_of

from ..helpers.models import mlp
from ..helpers.recipes import RECIPE


def calibrated(init, ranks, drift):
    """A recipe of made-up bowls whose best rate drifts with rank, and the rates that its optimizers really had."""
    used = []

    def train(trial):
        model = mlp((trial.rank, trial.rank) if trial.rank else (), init=init, width=32)
        groups = trial.optimizer(model).rates.groups
        role = "A" if trial.rank else "full"
        (rate,) = {group.lr for group in groups if group.role == role}
        used.append((trial.rank, trial.seed, rate))
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
    """A point's rate is that of the optimizer's A factors or whole weights: the fitted drift does not move it.

    Ranks ascend and full finetuning is last; rates by rank are those of `Recipe.at`, at powers of two.
    """
    made, used = calibrated(init, (32, None, 2), 1.0)
    picture = picture_of(made)
    drawn = [
        (arm.rank, point.seed, point.rate)
        for arm in picture.arms
        for point in arm.points
    ]
    for shown, ran in zip(sorted(drawn, key=str), sorted(used, key=str), strict=True):
        assert shown[:2] == ran[:2]
        assert shown[2] == pytest.approx(ran[2], rel=1e-6)
    assert [arm.rank for arm in picture.arms] == [2, 32, None]
    assert [rank for rank, *_ in picture.by_rank] == [2**e for e in range(8)]
    assert [rank for rank, _, tried in picture.by_rank if tried] == [2, 32]
    tried = {rank: rate for rank, rate, tried in picture.by_rank if tried}
    assert all(rate.lr == made.at(rank=rank).lr for rank, rate in tried.items())
    assert picture.full == made.at(method="full")


def test_a_sweeps_runs_stand_at_their_own_rates():
    """The points of a recipe made of a sweep are the sweep's rows."""
    rows = [
        {"rank": r, "lr": 2.0**-x, "loss": (x - 8) ** 2 / 20 + 1}
        for r in (4, 64)
        for x in (6, 7, 8, 9, 10)
    ]
    made = ra.sweeps.fit_sweep(rows, alpha=16, fan_in=64)
    drawn = [
        (arm.rank, point.rate, point.value)
        for arm in picture_of(made).arms
        for point in arm.points
    ]
    assert sorted(drawn) == sorted(
        (row["rank"], row["lr"], pytest.approx(row["loss"])) for row in rows
    )


@pytest.mark.parametrize("tensors", [{}, {"rank": np.array([4])}])
def test_a_recipe_without_trials_has_no_arms(tensors):
    """There is a picture without trials: rates by rank alone."""
    picture = picture_of(replace(RECIPE, tensors=tensors))
    assert picture.arms == ()
    assert len(picture.by_rank) == 9


ENDS = [  # how a trial ended, its score, and its mark in a frame from 0 to 1
    ("finished", 0.4, "finished", 0.4),
    ("finished", 1.2, "above", 0.97),
    ("diverged", 0.9, "diverged", 0.9),
    ("diverged", 7.0, "diverged", 0.97),
    ("diverged", math.inf, "diverged", 0.97),
    ("pruned", math.nan, "pruned", 0.97),
]


@pytest.mark.parametrize(("fate", "score", "mark", "height"), ENDS)
def test_a_mark_tells_how_a_trial_ended(fate, score, mark, height):
    """Each end has a mark of its own; a score that is unknown or above the frame stands at its upper edge."""
    arm = PictureArm(4, (Point(1e-3, score, 0, fate),), None, (0.0, 1.0))
    assert arm.marks() == {mark: [(1e-3, pytest.approx(height))]}
    assert mark in MARKS


scores = st.floats(-1e6, 1e6) | st.sampled_from([math.inf, math.nan, 1e300, -1e300])


@given(
    trials=st.lists(
        st.tuples(st.sampled_from([0, 4, 64]), st.floats(1e-6, 1.0), scores),
        min_size=1,
        max_size=12,
    )
)
def test_every_trial_is_a_mark_within_its_frame(trials):
    """Whatever the scores, each trial is one mark inside its frame, and the better half stands at its score."""
    ranks, rates, values = map(np.array, zip(*trials, strict=True))
    tensors = {"rank": ranks, "own_lr": rates, "value": values}
    tensors["pruned"] = np.isnan(values)
    picture = picture_of(replace(RECIPE, tensors=tensors))
    left, right = picture.rates
    assert sum(len(arm.points) for arm in picture.arms) == len(trials)
    for arm in picture.arms:
        low, high = arm.scores
        marks = [place for places in arm.marks().values() for place in places]
        assert len(marks) == len(arm.points)
        assert all(left < x < right and low < y < high for x, y in marks)
        finite = [point.value for point in arm.points if math.isfinite(point.value)]
        inside = [value for value in finite if value <= high]
        assert len(inside) >= len(finite) / 2
        if arm.rate is not None:
            assert left < arm.rate.low < arm.rate.high < right
