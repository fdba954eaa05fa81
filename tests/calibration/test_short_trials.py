"""Tests of how a search guards against short trials, which can favour learning rates that are too low."""

from __future__ import annotations

import math

import pytest
import torch

import rankaware_optim as ra
from rankaware_optim import CalibrationError
from rankaware_optim.calibration import Options, search
from rankaware_optim.laws import PRIOR_LAW, get_law

from ..helpers.calibrations import BEST, DIM, Net, calibrate, made_up, train

AdamW = torch.optim.AdamW
NOTES = {
    "steps": "trials of 99 steps can be misleading",
    "score": "mean of its last training losses",
    "warm-up": "the learning rate increased over 50% of a trial's steps",
    "low": "the best learning rate is the lowest one that was tried",
    "high": "the best learning rate is the highest one that was tried",
}


def scored(best=BEST, warmup=0):
    """Return a loop with a warm-up of `warmup` steps that returns a made-up loss on held-out data."""

    def loop(trial):
        model = Net(trial.rank)
        opt = trial.optimizer(model)
        model(torch.ones(1, DIM)).sum().backward()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            opt, lambda step: min((step + 1) / (warmup + 1), 1.0)
        )
        end = 0.2 * abs(math.log2(trial.lr) - best)
        for step in range(trial.steps):
            opt.step()
            yield 2.3 + (end - 2.3) * step / trial.steps
            schedule.step()
        return end

    return loop


@pytest.mark.parametrize(
    ("loop", "options", "said"),
    [
        (scored(), {"steps": 100}, set()),
        (scored(), {"steps": 99}, {"steps"}),
        (made_up(), {"steps": 100}, {"score"}),
        (scored(warmup=49), {"steps": 100}, {"warm-up"}),
        (scored(warmup=24), {"steps": 100}, set()),
        (scored(best=-20.0), {"steps": 100, "trials": 2}, {"low"}),
        (scored(best=0.0), {"steps": 100, "trials": 2}, {"high"}),
    ],
)
def test_what_makes_short_trials_mislead_is_said(loop, options, said):
    """Few steps, training losses as scores, a long warm-up and a best trial at an end of the range each add a note."""
    usual = {"ranks": (16,), "trials": 6, "progress": False}
    notes = calibrate(loop, **{**usual, **options}).notes
    found = {name for name, words in NOTES.items() if any(words in n for n in notes)}
    assert found == said


class WarmsUp(AdamW):
    """An optimizer that has its own warm-up."""

    def __init__(self, params, lr=1e-3, warmup_steps=100):
        super().__init__(params, lr=lr)
        for settings in (self.defaults, *self.param_groups):
            settings["warmup_steps"] = warmup_steps


@pytest.mark.parametrize(
    ("loop", "optimizer"),
    [(scored(warmup=20), AdamW), (scored(warmup=100), AdamW), (train, WarmsUp)],
)
def test_a_warm_up_as_long_as_the_trial_is_refused(loop, optimizer):
    """A warm-up over the whole trial raises an error, whether it is a schedule's or the optimizer's own."""
    with pytest.raises(CalibrationError, match="warm-up is as long as the trial"):
        calibrate(loop, ranks=(16,), steps=20, optimizer=optimizer, progress=False)


# --- around a suggested learning rate -------------------------------------------------------------------------------

SUGGESTED = 2.0**BEST


def around(loop, *, steps=100, target=800, noisy=False, **own):
    """Return the recipe of a search of four trials around a suggested learning rate."""
    rate = ra.Rate(SUGGESTED, SUGGESTED / 8, SUGGESTED * 8)
    usual = {"ranks": (16,), "trials": 4, "seeds": (0,), "suggested": rate}
    usual["noisy"] = noisy
    lengths = {"steps": steps, "target_steps": target}
    options = Options(AdamW, get_law(PRIOR_LAW), **lengths, **{**usual, **own})
    return search(loop, options)


@pytest.mark.parametrize("low", [-9.0, -12.0])
def test_an_eighth_does_not_go_below_the_suggested_rate(low):
    """Trials of one eighth of the run never go below the suggested learning rate, and a note says why."""
    recipe = around(scored(best=low))
    assert min(recipe.tensors["lr"]) >= SUGGESTED * (1 - 1e-9)
    assert recipe.lr == pytest.approx(SUGGESTED)
    assert any(
        "favour learning rates that are too low" in note for note in recipe.notes
    )
    assert recipe.at(rank=16, alpha=32).low < SUGGESTED / 2


@pytest.mark.parametrize(
    "own", [{"target": 400}, {"lr_range": (SUGGESTED / 16, SUGGESTED * 16)}]
)
def test_a_quarter_and_a_range_of_ones_own_go_below_it(own):
    """Trials of a quarter of the run, and trials with lr_range=, may go below the suggested learning rate."""
    recipe = around(scored(best=-10.0), **own)
    assert recipe.lr < SUGGESTED / 2


def test_an_eighth_goes_above_the_suggested_rate():
    """Trials of one eighth of the run can find a better learning rate above the suggested one."""
    assert around(scored(best=-5.0)).lr > SUGGESTED


def rewards(slope, noise):
    """Return a loop of noisy values to minimise, which fall by `slope` for each octave of learning rate."""

    def loop(trial):
        trial.optimizer(Net(trial.rank))
        octaves = math.log2(trial.lr) - BEST
        for _ in range(trial.steps):
            yield float(torch.randn(()) * noise - slope * octaves)

    return loop


@pytest.mark.parametrize(("slope", "by_chance"), [(0.0, True), (2.0, False)])
def test_values_that_differ_by_chance_give_the_suggested_rate(slope, by_chance):
    """If noise explains the differences between runs, the recipe has the suggested learning rate and interval, and a note."""
    recipe = around(rewards(slope, 1.0), target=100, noisy=True)
    said = any("no larger than chance" in note for note in recipe.notes)
    assert said == by_chance
    if by_chance:
        rate = recipe.at(rank=16, alpha=32)
        assert rate.lr == pytest.approx(SUGGESTED)
        assert rate.low == pytest.approx(SUGGESTED / 8, rel=0.05)
    else:
        assert recipe.lr > 1.5 * SUGGESTED


def test_rewards_that_all_fall_a_little_are_no_divergence():
    """A noisy value that rises in every run does not make the search go below the suggested learning rate."""

    def loop(trial):
        trial.optimizer(Net(trial.rank))
        for step in range(trial.steps):
            yield float(torch.randn(())) + (2.0 if step > 60 else 0.0)

    recipe = around(loop, target=100, noisy=True)
    assert recipe.lr == pytest.approx(SUGGESTED)
