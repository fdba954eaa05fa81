"""What a picture of a recipe shows: trials where they ran, curves whose optimum is the recipe's, a frame that holds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rankaware_optim as ra
from rankaware_optim.optimizer import effective_lr
from rankaware_optim.reports._picture import MARKS, PictureArm, Point, picture_of

from ..helpers.models import mlp
from ..helpers.recipes import KINDS

RANKS = (2, 32)


def calibrated(init, ranks, drift):
    """A recipe of made-up bowls whose best rate drifts with rank, and the rates that its optimizers really had."""
    used = []

    def train(trial):
        model = mlp((trial.rank, trial.rank) if trial.rank else (), init=init, width=32)
        groups = trial.optimizer(model).param_groups
        role = "A" if trial.rank else "full"
        (rate,) = {
            effective_lr(group) for group in groups if group["lora_role"] == role
        }
        used.append((trial.rank, trial.seed, rate))
        u = math.log2(rate) + 7 - drift * math.log2((trial.rank or 32) / 8)
        for step in range(trial.steps):
            yield 2.0 - 1.5 * step / trial.steps * math.exp(-u * u / 8)

    options = {"lr_range": (2.0**-11, 2.0**-3), "seeds": (0, 1)}
    return ra.calibrate(
        train, torch.optim.AdamW, ranks=ranks, steps=20, trials=8, **options
    ), used


@pytest.mark.parametrize("drift", [-1.0, 1.0])
@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("ranks", [RANKS, (*RANKS, None)], ids=["lora", "with full"])
def test_trials_stand_at_the_rates_they_ran_at(init, ranks, drift):
    """A point's rate is that of the optimizer's A factors or whole weights: the fitted drift does not move it."""
    made, used = calibrated(init, ranks, drift)
    drawn = [
        (arm.rank, point.seed, point.rate)
        for arm in picture_of(made).arms
        for point in arm.points
    ]
    for shown, ran in zip(sorted(drawn, key=str), sorted(used, key=str), strict=True):
        assert shown[:2] == ran[:2]
        assert shown[2] == pytest.approx(ran[2], rel=1e-6)


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


@pytest.mark.parametrize("init", ["A", "B"])
def test_a_curve_bottoms_out_at_the_recipes_best_rate(init):
    """Each rank's curve is lowest at the rate that the recipe holds for best there."""
    made, _ = calibrated(init, RANKS, 0.5)
    picture = picture_of(made)
    for arm in picture.arms:
        rate, _ = min(arm.curve, key=lambda point: point[1])
        assert math.log2(rate) == pytest.approx(
            math.log2(arm.rate.lr) + made.lean, abs=0.1
        )


def test_a_curve_passes_near_its_trials():
    """On a sweep of two bowls every score lies near its rank's curve."""
    octaves = (5.5, 6, 6.5, 7, 7.5, 8, 8.5, 9)
    rows = [
        {"rank": r, "lr": 2.0**-x, "loss": (x - 7 - (r > 4)) ** 2 / 8 + 1}
        for r in (4, 64)
        for x in octaves
    ]
    for arm in picture_of(ra.sweeps.fit_sweep(rows, alpha=16, fan_in=64)).arms:
        for point in arm.points:
            near = min(arm.curve, key=lambda there: abs(there[0] - point.rate))
            assert (
                near[1] == pytest.approx(point.value, abs=0.1)
                or point.value > arm.curve[0][1]
            )


def test_a_rank_whose_trials_were_all_pruned_has_no_curve():
    """Trials stopped for being worse are shown as pruned, and shape no curve where no run of their rank finished."""
    made, _ = calibrated("A", RANKS, 0.0)
    cut = made.tensors["rank"] == 2
    value = np.where(cut, np.nan, made.tensors["value"])
    arm = picture_of(
        replace(made, tensors={**made.tensors, "value": value, "pruned": cut})
    ).arms[0]
    assert {point.fate for point in arm.points} == {"pruned"}
    assert arm.curve == ()


def test_the_frame_holds_every_rate_and_the_good_half_of_the_scores():
    """Every trial and band lies within the rates drawn; scores at or below the median lie inside."""
    made, _ = calibrated("A", RANKS, 0.0)
    picture = picture_of(made)
    low, high = picture.rates
    points = [point for arm in picture.arms for point in arm.points]
    assert all(low < point.rate < high for point in points)
    assert all(low < arm.rate.low < arm.rate.high < high for arm in picture.arms)
    scores = sorted(point.value for point in points if math.isfinite(point.value))
    assert picture.values[0] < scores[0] <= scores[len(scores) // 2] < picture.values[1]


def test_arms_are_in_order_and_full_finetuning_is_last():
    """Ranks ascend, and full finetuning closes the row; the rates by rank are `Recipe.at`'s, at powers of two and between."""
    made, _ = calibrated("A", (32, None, 2), 0.0)
    picture = picture_of(made)
    assert [arm.rank for arm in picture.arms] == [2, 32, None]
    assert {rank for rank, _ in picture.by_rank} >= {2**e for e in range(8)}
    assert picture.by_rank[-1][0] == 128
    assert all(
        rate.lr == made.at(rank).lr for rank, rate in picture.by_rank if rank in RANKS
    )
    assert picture.full == made.at(method="full")


@pytest.mark.parametrize("tensors", [{}, {"rank": np.array([4])}])
def test_a_recipe_without_trials_has_no_arms(tensors):
    """There is a picture without trials: rates by rank alone."""
    made, _ = calibrated("A", RANKS, 0.0)
    picture = picture_of(replace(made, tensors=tensors))
    assert picture.arms == ()
    assert len(picture.by_rank) > 8


def test_an_older_recipe_is_drawn_along_the_law_its_trials_ran_along():
    """Without `own_lr` trials are moved by the law at its prior; where no alpha is known they are marked as unmoved."""
    made, used = calibrated("B", RANKS, -1.0)
    older = replace(
        made,
        tensors={key: value for key, value in made.tensors.items() if key != "own_lr"},
    )
    rates = [point.rate for arm in picture_of(older).arms for point in arm.points]
    assert sorted(rates) == pytest.approx(sorted(rate for *_, rate in used))
    lost = picture_of(replace(older, scaling_rule="unknown"))
    assert {arm.rank: arm.by_base for arm in lost.arms} == {2: True, 32: False}


SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize(
    "made", [*KINDS.values(), *SHIPPED], ids=[*KINDS, *(path.stem for path in SHIPPED)]
)
def test_a_ranks_own_frame_holds_its_scores(made):
    """A rank's frame has its own height: all its scores are inside, but those farther off than the whole is high."""
    picture = picture_of(ra.Recipe.load(made) if isinstance(made, Path) else made)
    height = picture.values[1] - picture.values[0]
    for arm in picture.arms:
        low, high = arm.values
        scores = [point.value for point in arm.points if math.isfinite(point.value)]
        assert all(
            low < value < high for value in scores if value <= min(scores) + height
        )
        assert all(low < value for _, value in arm.curve)


KINDS_OF_MARKS = [  # how a trial ended, its score, and its mark in a frame from 0 to 1
    ("finished", 0.4, "finished", 0.4),
    ("finished", 1.2, "above", 0.97),
    ("diverged", 0.9, "diverged", 0.9),
    ("diverged", 7.0, "diverged", 0.97),
    ("diverged", math.inf, "diverged", 0.97),
    ("pruned", math.nan, "pruned", 0.97),
]


@pytest.mark.parametrize(("fate", "score", "mark", "height"), KINDS_OF_MARKS)
def test_a_mark_tells_how_a_trial_ended(fate, score, mark, height):
    """Each end has a mark of its own; a score that is unknown or above the frame stands at its upper edge."""
    point = Point(1e-3, score, 0, fate, np.empty(0))
    marks = PictureArm(4, (point,), None).marks((0.0, 1.0))
    assert marks == {mark: [(1e-3, pytest.approx(height))]}
    assert mark in MARKS


def test_half_of_a_ranks_scores_are_in_its_frame():
    """Where a rank's scores lie wider apart than those of all ranks, its frame is higher."""
    scores = {4: (3.0, 3.5, 4.0, 9.0), 64: (1.0, 1.01, 1.02, 1.03, 1.04)}
    rows = [
        {"rank": rank, "lr": 2.0 ** -(n + 5), "loss": score}
        for rank, column in scores.items()
        for n, score in enumerate(column)
    ]
    for arm in picture_of(ra.sweeps.fit_sweep(rows, alpha=16, fan_in=64)).arms:
        assert len(arm.marks(arm.values)["finished"]) >= len(arm.points) / 2
        assert arm.curve
