"""Tests of how a calibration uses its steps: the order of its trials, full trials, and stopping runs early."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankaware_optim.calibration._schedule import Options, next_setting
from rankaware_optim.calibration._search import is_behind
from rankaware_optim.calibration._trials import Run, Trials
from rankaware_optim.fitting import Prior, fit_observations
from rankaware_optim.laws import get_law

from ..helpers.calibrations import (
    BEST,
    AdamW,
    Net,
    bowl,
    calibrate,
    falling,
    made_up,
)

# --- the schedule ---------------------------------------------------------------------------------------------------


def planned(**options):
    """Return the options of a calibration at ranks 4 and 64 with two seeds."""
    return Options(AdamW, get_law("mua"), (4, 64), (0, 1), 10, **options)


def records(trials):
    """Return the runs that a calibration reads from Optuna's trials."""
    return Trials(map(Run.read, trials))


@given(trials=st.none() | st.integers(1, 30), full=st.integers(0, 6))
def test_a_schedule_keeps_to_its_counts(trials, full):
    """The search has the requested number of runs, full runs come last, and each rank changes its seed every four runs."""
    options = planned(trials=trials, full_trials=full)
    done = []
    while (setting := next_setting(options, Trials(done))) is not None:
        done.append(finished(setting, len(done)))
    ranks = [run.rank for run in done]
    assert ranks.index(None) if full else len(ranks) == (trials or 16)
    assert ranks[trials or 16 :] == [None] * full
    for rank in (4, 64, None):
        seeds = [run.seed for run in done if run.rank == rank]
        assert seeds == [i // 4 % 2 for i in range(len(seeds))]


def finished(setting, number):
    state = optuna.trial.TrialState.COMPLETE
    return Run(*setting, number, state, x=-7.0, score=1.0, curve=[2.0] * 10)


# --- full finetuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [-0.8, 0.0, 0.8])
@pytest.mark.parametrize("full_trials", [1, 3])
def test_full_trials_come_last_around_the_predicted_rate(factor, full_trials):
    """Full trials follow the LoRA trials with one seed, and come close to an optimum that differs from the prediction."""
    best = {4: BEST, 64: BEST, None: BEST + factor}
    recipe = calibrate(
        made_up(best.get), ranks=(4, 64), trials=10, full_trials=full_trials
    )
    ranks, rates = recipe.tensors["rank"].tolist(), recipe.tensors["lr"].tolist()
    assert ranks[10:] == [0] * full_trials
    assert set(recipe.tensors["seed"][10:].tolist()) == {0}
    assert recipe.full_seen
    assert recipe.ranks == (4, 64)
    octaves = [math.log2(lr) - BEST - factor for lr in rates[10:]]
    assert min(map(abs, octaves)) < (1.2 if full_trials == 1 else 0.75)
    if full_trials == 3:
        assert len({round(x, 3) for x in octaves}) == 3
        assert math.log2(recipe.law.full_factor) * factor >= 0


# --- pruning --------------------------------------------------------------------------------------------------------


def run(x, curve, *, rank=4, seed=0, state="RUNNING", noise=0.0, warmup=0.0):
    """Return a run at `x`, log2 of its learning rate, whose loss curve has ten steps at each value of `curve`."""
    means = [mean for mean in curve for _ in range(10)]
    wave = [noise * (-1) ** step for step in range(len(means))]
    # at this height, the wave has the same second differences as white noise
    height = 0.6745 * math.sqrt(6) / 4
    curve = [mean + height * each for mean, each in zip(means, wave, strict=True)]
    state = optuna.trial.TrialState[state]
    return Run(
        rank, seed, state=state, x=x, curve=curve, score=curve[-1], warmup=warmup
    )


BEST_CURVE = [2.0, 1.3, 1.1, 1.0, 0.95, 0.9, 0.88, 0.86, 0.85, 0.85]
BEHIND = [1.95, 1.9, 1.88, 1.85]
JUDGED = {
    "far behind": ({"curve": BEHIND}, True),
    "too early": ({"curve": BEHIND[:2]}, False),
    "another rank": ({"curve": BEHIND, "rank": 64}, False),
    "another seed": ({"curve": BEHIND, "seed": 1}, False),
    "near the best": ({"x": -7.5, "curve": BEHIND}, False),
    "near the estimate": ({"x": -9.5, "curve": BEHIND, "estimate": -9.0}, False),
    "a little behind": ({"curve": [1.8, 1.5, 1.3, 1.2]}, False),
    "noise explains it": ({"curve": [1.6, 1.7, 8.0, 1.61]}, False),
    "ahead": ({"curve": [1.2, 1.1, 1.0, 0.9]}, False),
    "risen": ({"x": -4.0, "curve": [2.4, 2.5, 2.6, 2.7]}, True),
    "the best gained more than its noise": ({"curve": BEHIND, "best": 0.4}, True),
    "the best gained as much as its noise": ({"curve": BEHIND, "best": 0.7}, False),
    "the warm-up is over": ({"curve": BEHIND, "warmup": 0.39}, True),
    "the warm-up lasts": ({"curve": BEHIND, "warmup": 0.41}, False),
}


@pytest.mark.parametrize(("of", "expected"), JUDGED.values(), ids=JUDGED)
def test_what_is_stopped(of, expected):
    """A run is stopped only if it clearly lags behind the best run of its rank and seed at the same step."""
    given = {"x": -11.0, **of}
    estimate, noise = given.pop("estimate", None), given.pop("best", 0.0)
    warmup = given.pop("warmup", 0.0)
    calibration = SimpleNamespace(
        options=SimpleNamespace(steps=100),
        trials=lambda: trials,
        fit=lambda: estimate and SimpleNamespace(best=lambda rank: estimate),
    )
    trials = Trials()
    assert not is_behind(calibration, run(**given))
    trials = Trials(
        (
            run(-7.0, BEST_CURVE, state="COMPLETE", noise=noise, warmup=warmup),
            run(-12.0, [1.99] * 10, state="COMPLETE"),
        )
    )
    assert is_behind(calibration, run(**given)) is expected


OCTAVES = BEST - 8, BEST + 3
WIDE = 2.0 ** OCTAVES[0], 2.0 ** OCTAVES[1]


# --- notes and fits -------------------------------------------------------------------------------------------------


def unsteady(trial):
    """Yield losses whose first value depends on the trial's number instead of its seed."""
    trial.optimizer(Net(trial.rank))
    start = 2.3 + 0.1 * trial.number
    for step in range(trial.steps):
        yield start + (bowl(math.log2(trial.lr) - BEST) - start) * min(step / 10, 1)


def scored(trial):
    """Yield training losses, and return a loss on held-out data as the score."""
    yield from islice(made_up()(trial), trial.steps)
    return bowl(math.log2(trial.lr) - BEST)


SAID = [
    (scored, (4, 64), None),
    (scored, (16,), None),
    (unsteady, (4, 64), "not reproducible: two runs of rank"),
]


@pytest.mark.parametrize(("loop", "ranks", "note"), SAID, ids=lambda v: str(v)[:20])
def test_doubts_are_said(loop, ranks, note):
    """A recipe has a note that the loop is not reproducible if two runs with the same seed differ, and no note otherwise."""
    notes = calibrate(loop, ranks=ranks, trials=12, steps=100).notes
    assert (notes == ()) if note is None else any(note in said for said in notes)


def test_a_pruned_run_tells_the_fit_how_far_behind_it_was():
    """The fit scores a run that was stopped early by its distance from the best run of the same rank and seed."""
    state = optuna.trial.TrialState
    falling = [1.0 - 0.07 * step for step in range(10)]
    higher = [value + 0.2 for value in falling]
    best = Run(4, 0, 0, state.COMPLETE, -8.0, curve=falling, score=0.3)
    lost = Run(4, 0, 1, state.PRUNED, -6.0, curve=higher[:6], end="pruned")
    others = (
        replace(lost, seed=1),
        replace(lost, end="memory"),
        replace(lost, curve=higher[:2]),
        replace(lost, curve=[]),
        replace(lost, state=state.FAIL),
    )
    whole, seen = Trials((best, lost, *others)).evidence()
    assert (seen.x, seen.returned) == (-6.0, True)
    assert (seen.value, seen.tail) == pytest.approx((0.5, whole.tail + 0.2))


def test_the_recipe_is_the_fit_of_every_trial():
    """The recipe is fitted to all runs, including the runs that were stopped early."""
    storage = optuna.storages.InMemoryStorage()
    recipe = calibrate(
        falling(0.01),
        ranks=(4, 64),
        steps=100,
        trials=16,
        lr_range=WIDE,
        storage=storage,
    )
    trials = records(storage.get_all_trials(0))
    assert len(trials.evidence()) > len(trials.observations())
    fit = fit_observations(trials.evidence(), Prior(pivot=16.0))
    assert recipe.covariance == pytest.approx(fit.covariance, rel=1e-12)
