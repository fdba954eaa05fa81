"""Tests of target_steps=: calibrating a long run with trials that are shorter than the run."""

from __future__ import annotations

import math
import random

import optuna
import pytest

import rankaware_optim as ra

from ..helpers.calibrations import BEST, Net, bowl, calibrate, made_up, states

STEPS, TARGET = 20, 160
Z90 = 1.645
# the standard deviation, in octaves, that eight times as many steps add
EIGHT_TIMES = 0.904


def whole(best=lambda rank: BEST, init="A", seen=None):
    """Return a loop whose final loss is lowest if log2 of the learning rate is `best(rank)`."""

    def train(trial):
        trial.optimizer(Net(trial.rank, init=init))
        if seen is not None:
            seen.append((trial.rank, trial.steps, math.log2(trial.lr)))
        end = bowl(math.log2(trial.lr) - best(trial.rank))
        for step in range(trial.steps):
            yield (
                2.3
                + (end - 2.3) * min(2 * (step + 1) / trial.steps, 1.0)
                + 0.01 * random.random()
            )

    return train


def band(rate):
    """Return log2 of the middle of an interval, and its standard deviation in octaves."""
    low, high = math.log2(rate.low), math.log2(rate.high)
    return (low + high) / 2, (high - low) / (2 * Z90)


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "init"), [((4, 16), "A"), ((4, 16), "B"), ((None,), "A")], ids=str
)
def test_the_rate_stays_and_its_band_widens(ranks, init):
    """target_steps= changes neither the trials nor the middle of the interval, but makes the interval wider."""
    near, far = (
        calibrate(whole(init=init), ranks=ranks, trials=12, target_steps=to)
        for to in (None, TARGET)
    )
    assert (near.steps, far.steps) == (STEPS, TARGET)
    assert far.tensors["lr"] == pytest.approx(near.tensors["lr"])
    method = {"method": "full"} if ranks == (None,) else {"rank": 4}
    (at_near, sd_near), (at_far, sd_far) = (
        band(recipe.at(**method)) for recipe in (near, far)
    )
    assert at_far == pytest.approx(at_near)
    assert sd_far == pytest.approx(math.hypot(sd_near, EIGHT_TIMES), abs=1e-3)
    note = f"the run has {TARGET} steps, but the learning rate was measured in trials of {STEPS} steps: give or take a factor of {2.0**EIGHT_TIMES:.3g}"
    assert note in far.notes
    assert not any("measured in trials of" in note for note in near.notes)


@pytest.mark.filterwarnings("ignore:Recipe 'calibration' extrapolates")
def test_a_longer_target_is_the_same_in_a_search_and_in_a_recipe():
    """A calibration with target_steps= gives the same learning rate and interval as `Recipe.at` with steps=."""
    short, long = (
        calibrate(whole(), trials=8, target_steps=to) for to in (None, TARGET)
    )
    for method in ("lora", "full"):
        asked = short.at(method=method, steps=TARGET)
        target = long.at(method=method)
        assert (asked.lr, asked.low, asked.high) == pytest.approx(
            (target.lr, target.low, target.high)
        )


# --- the runs -------------------------------------------------------------------------------------------------------


def test_trials_are_whole_runs():
    """Every trial has `steps` steps, whatever the value of target_steps=."""
    seen = []
    calibrate(whole(seen=seen), target_steps=TARGET, trials=7, full_trials=3)
    assert {steps for _, steps, _ in seen} == {STEPS}
    assert [rank for rank, *_ in seen[-3:]] == [None] * 3


def test_the_target_may_change_when_a_study_goes_on(tmp_path):
    """A study can be continued with another target_steps= without new trials, because the trials do not depend on it."""
    journal, trained = tmp_path / "study.journal", []
    targets = (TARGET, 2 * TARGET, None)
    made = [
        calibrate(whole(seen=trained), trials=8, storage=journal, target_steps=to)
        for to in targets
    ]
    assert [recipe.steps for recipe in made] == [TARGET, 2 * TARGET, STEPS]
    assert len(trained) == 8
    assert made[-1].lr == pytest.approx(calibrate(whole(), trials=8).lr)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_loop_that_ignores_its_steps_is_found_by_its_first_run():
    """An endless loop that never reads trial.steps raises an error after its first trial, which does not count."""
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ra.CalibrationError, match=r"never read trial\.steps"):
        calibrate(made_up(), target_steps=TARGET, storage=storage)
    assert states(storage.get_all_trials(0)) == ["FAIL"]
    assert (
        calibrate(whole(), target_steps=TARGET, storage=storage, trials=4).steps
        == TARGET
    )
