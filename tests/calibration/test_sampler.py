"""Tests of which learning rate the search tries next, given finished runs and the runs of other workers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from rankaware_optim import MuA, Reference
from rankaware_optim.calibration._calibration import first_rate
from rankaware_optim.calibration._constants import STRIDE
from rankaware_optim.calibration._schedule import Options
from rankaware_optim.calibration._search import (
    between,
    divergence_limits,
    next_bracket,
    next_rate,
    next_refinement,
    search_range,
)
from rankaware_optim.calibration._trials import PARAMETER, Run, Trials
from rankaware_optim.fitting import Observation

from ..helpers.optimizers import called

START, LOW, HIGH = -6.5, -10.5, -2.5
RANGE = {PARAMETER: FloatDistribution(LOW, HIGH)}


def trial_of(
    rank: int | None, x: float, value: float | None = None
) -> optuna.trial.FrozenTrial:
    """Return a finished run with a score, or a run that another worker is still running if `value` is None."""
    attributes: dict[str, object] = {"rank": rank, "seed": 0}
    if value is None:
        return create_trial(
            state=TrialState.RUNNING,
            params={PARAMETER: x},
            distributions=RANGE,
            user_attrs=attributes,
        )
    attributes |= {"curve": [1.0] * 5 + [value] * 5}
    attributes["end"] = "" if math.isfinite(value) else "diverged"
    return create_trial(
        value=value, params={PARAMETER: x}, distributions=RANGE, user_attrs=attributes
    )


def numbered(*trials: optuna.trial.FrozenTrial) -> Trials:
    """Return the trials as a study contains them, numbered in their order."""
    for number, trial in enumerate(trials):
        trial.number = number
    return Trials(map(Run.read, trials))


def proposed(*trials: optuna.trial.FrozenTrial, rank: int | None = 2) -> float:
    """Return log2 of the learning rate that the next trial at `rank` gets before there is a fit."""
    return next_after(trials, None, rank)


def next_after(trials, fit, rank=2, *, within=(LOW, HIGH), full_trials=0) -> float:
    """Return log2 of the learning rate that the next trial at `rank` gets, given a fit of the earlier trials."""
    options = SimpleNamespace(full_trials=full_trials)
    seen = numbered(*trials)
    calibration = SimpleNamespace(
        start=START, fit=lambda: fit, trials=lambda: seen, options=options
    )
    return next_rate(calibration, rank, within)


@pytest.mark.parametrize(
    ("trials", "rank", "expected"),
    [
        ((), 2, START),
        ((trial_of(2, START),), 2, START - 2),
        ((trial_of(2, START),), 32, START - 2),
        ((trial_of(2, START, 0.5),), 32, START + 2),
        ((trial_of(2, START, 0.5), trial_of(32, START + 2)), 2, START - 2),
        ((trial_of(32, START, 0.5), trial_of(32, START + 2)), 2, START - 1),
        (
            (
                trial_of(2, START, 0.5),
                trial_of(2, START - 2, 0.6),
                trial_of(32, START + 2),
            ),
            2,
            START - 3,
        ),
    ],
)
def test_no_rank_tries_a_rate_twice_while_others_work(trials, rank, expected):
    """The outward search skips learning rates that other workers are running or that this rank has already tried."""
    assert proposed(*trials, rank=rank) == pytest.approx(expected)


@pytest.mark.parametrize("rank", [2, 32])
def test_where_all_diverged_the_search_goes_down_at_every_rank(rank):
    """If all runs diverged, the next run at any rank is two octaves below the lowest learning rate tried."""
    lost = math.inf
    trials = trial_of(2, START, lost), trial_of(2, START - 2, lost)
    assert proposed(*trials, rank=rank) == pytest.approx(START - 4)


def test_many_workers_begin_at_as_many_rates():
    """Forty workers that start at once get forty different learning rates, spread over the whole range."""
    begun: list[float] = []
    for _ in range(40):
        begun.append(proposed(*(trial_of(2, x) for x in begun)))
    assert len(set(begun)) == 40
    assert all(LOW <= x <= HIGH for x in begun)
    assert max(b - a for a, b in pairwise(sorted(begun))) <= 1.0


def test_a_run_above_one_that_diverged_is_no_best():
    """A good run above a learning rate that diverged does not bracket the optimum: the search goes on below."""
    lost = Observation(2, 0, START + 2, math.inf, 1.0, math.inf)
    seen = [Observation(2, 0, START, 0.5, 1.0, 0.5), lost, replace(lost, x=START - 2)]
    assert next_bracket(seen, START - 10, START + 10) == START - 4
    below = Observation(2, 0, START - 4, 0.3, 1.0, 0.3)
    assert next_bracket([*seen, below], START - 10, START + 10) == START - 6


def run(x: float, value: float, first: float = 1.0, noise: float = 0.0) -> Observation:
    return Observation(2, 0, x, value, 1.0, value, first=first, noise=noise)


# runs whose loss hardly changes compared with its noise
IDLE = [run(START + x, 0.99, noise=0.1) for x in (0.0, 2.0, 4.0)]
BRACKETS = [
    # the runs, and log2 of the next learning rate of the outward search
    ([run(START, 0.5)], START + 2),
    ([run(START, 0.5), run(START + 2, 0.9)], START - 2),
    ([run(START, 0.5), run(START + 2, 0.55)], START + 4),
    ([run(START, 0.5), run(START + 2, 0.9), run(START - 2, 0.6)], None),
    ([run(START, 0.5), run(START + 2, 0.9), run(START - 0.45, 0.6)], START - 2),
    ([run(START, 0.5), run(START + 2, 0.9), run(START - 0.6, 0.6)], None),
    (IDLE[:2], START + 4),
    (IDLE, START - 2),
]


@pytest.mark.parametrize(("runs", "expected"), BRACKETS)
def test_the_search_outwards_ends_where_the_optimum_is_bracketed(runs, expected):
    """The outward search ends once a clearly worse run is above the best run and another run is below it.

    After three runs that learned nothing, the search goes down.
    """
    assert next_bracket(runs, START - 10, START + 10) == expected


PRUNED = [
    # the runs, log2 of the learning rate of a run that was stopped early, and log2 of the next learning rate
    ([run(START, 0.5), run(START + 2, 0.9)], START - 2, None),
    ([run(START, 0.5)], START + 2, START - 2),
    ([run(START, 0.5), run(START - 2, 0.6)], START + 2, None),
]


@pytest.mark.parametrize(("runs", "pruned", "expected"), PRUNED)
def test_a_run_that_was_stopped_early_counts_as_tried(runs, pruned, expected):
    """A run that was stopped early brackets the optimum on its side of the best run, and is not tried again."""
    assert next_bracket(runs, START - 10, START + 10, [pruned]) == expected


@pytest.mark.parametrize("full_trials", [0, 3])
def test_a_rank_is_refined_whether_or_not_full_runs_come_later(full_trials):
    """Once the optimum is bracketed, the next trial refines the rank, whether or not full trials come later."""
    runs = [trial_of(2, x, v) for x, v in ((-6.0, 0.5), (-4.0, 0.9), (-8.0, 0.6))]
    fit = SimpleNamespace(best=lambda rank: -6.5, ceiling=None)
    assert next_after(runs, fit, full_trials=full_trials) == -5.25


def test_a_rank_stays_below_what_diverged():
    """No trial comes closer than half an octave to the ceiling, even if the fitted optimum is there."""
    runs = [trial_of(2, x, v) for x, v in ((-8.5, 0.5), (-7.5, 0.9), (-10.0, 0.6))]
    fit = SimpleNamespace(best=lambda rank: -6.0, ceiling=-6.0)
    assert next_after(runs, fit) == -6.5


FIRST = [
    (torch.optim.AdamW, -11.8),
    (torch.optim.SGD, -4.0),
    (called("Muon"), -8.0),
    (called("Lamb"), -8.0),
]


@pytest.mark.parametrize(("optimizer", "usual"), FIRST)
def test_the_first_rate_is_two_octaves_above_the_familys_usual_one(optimizer, usual):
    """The first trial is two octaves above the usual learning rate of the optimizer's family."""
    options = Options(optimizer, MuA(), (16,), (0,), 10)
    reference = Reference(16, 32, fan_in=4096)
    assert first_rate(options, reference) == pytest.approx(usual + STRIDE)


@pytest.mark.parametrize("centre", [-9.5, -6.0, -3.0])
def test_refinement_goes_to_no_rate_twice(centre):
    """Five refinements of a rank give five new learning rates within the range, even near its edge."""
    rates = [centre]
    for _ in range(5):
        rates.append(next_refinement(rates, centre, (LOW, HIGH)))
    assert len(set(rates)) == len(rates)
    assert all(LOW <= x <= HIGH for x in rates)


def test_refinement_stays_between_rates_that_were_pruned():
    """No refinement lies beyond a run that was stopped early on the same side of the best run."""
    seen, pruned = [Observation(2, 0, -5.0, 0.5, 1.0, 0.5)], [-3.7, -1.1]
    for _ in range(3):
        tried = [*pruned, *(run.x for run in seen)]
        x = next_refinement(tried, -2.0, between(seen, pruned))
        assert x < -3.7
        seen.append(Observation(2, 0, x, 0.6, 1.0, 0.6))


# --- full finetuning: around the predicted rate ---------------------------------------------------------------------

PREDICTED = -8.0
OF_LORA = trial_of(2, START, 0.5)
FULL = [
    # log2 of the learning rates and the losses of the full runs so far, and log2 of the next learning rate
    ([], PREDICTED),
    ([(-8.0, 0.5)], -9.0),
    ([(-8.0, math.inf)], -9.0),
    ([(-8.0, 0.5), (-9.0, 0.6)], -7.0),
    ([(-8.0, 0.5), (-9.0, 0.4)], -10.0),
    ([(-8.0, 0.5), (-9.0, 0.6), (-7.5, 0.6)], -8.5),
    ([(-8.0, 0.5), (-9.0, 0.6), (-6.0, 0.6)], -7.0),
]


@pytest.mark.parametrize(("runs", "expected"), FULL)
def test_full_runs_go_around_the_predicted_rate(runs, expected):
    """Full trials start at the prediction, then go an octave below and above the best, and then fill the wider gap."""
    seen = [OF_LORA, *(trial_of(None, x, value) for x, value in runs)]
    fit = SimpleNamespace(best=lambda rank: PREDICTED, ceiling=None)
    at = next_after(seen, fit, None, within=(-20.0, 0.0), full_trials=3)
    assert at == expected


# --- the range ------------------------------------------------------------------------------------------------------

RANGES = [
    # log2 of the learning rates and the losses, and the strides by which the ends of the range move
    ([], (0, 0)),
    ([(START, 0.5)], (0, 0)),
    ([(LOW + 0.5, 0.5), (START, 0.6)], (-1, 0)),
    ([(LOW + 1.0, 0.5), (START, 0.6)], (0, 0)),
    ([(START, 0.5), (LOW + 0.5, 0.6)], (0, 0)),
    ([(HIGH - 0.5, 0.5)], (0, 1)),
    # the first run was the best when it finished
    ([(HIGH - 0.5, 0.6), (START, 0.5)], (0, 1)),
    ([(START, 0.5), (HIGH - 0.5, 0.6)], (0, 0)),
    ([(HIGH, 0.6), (HIGH - 0.5, 0.5)], (0, 1)),
    ([(HIGH - 0.5, math.inf)], (0, 0)),
    ([(LOW + 0.5, math.inf)], (-1, 0)),
]


@pytest.mark.parametrize(("runs", "moved"), RANGES)
def test_the_range_widens_at_the_edge_of_the_best(runs, moved):
    """If a run near an edge of the range was the best when it finished, this edge moves outwards."""
    seen = numbered(*(trial_of(2, x, value) for x, value in runs))
    options = SimpleNamespace(octaves=(LOW, HIGH), floor=-math.inf)
    calibration = SimpleNamespace(start=START, options=options, trials=lambda: seen)
    low, high = search_range(calibration)
    assert ((low - LOW) / STRIDE, (high - HIGH) / STRIDE) == moved


# --- the limits of a run --------------------------------------------------------------------------------------------


def test_a_run_may_rise_by_half_the_gain_or_one_gain_above_a_run_beside_it():
    """The limit is half a gain above the usual start, or 1.5 gains above a run on the same batches, if that is higher."""
    curve = [1.0] * 5 + [3.0] * 5 + [0.2] * 5  # batches with a high loss in the middle
    run = trial_of(2, START, 0.2)
    run.set_user_attr("curve", curve)
    seen = numbered(run)
    setting = seen[0].setting
    limits = divergence_limits(seen, setting, 15)
    gain = 0.8
    assert limits[:5] == pytest.approx([1.0 + 1.5 * gain] * 5)
    assert limits[9] == pytest.approx(3.0 + 1.5 * gain)
    assert limits[14] == pytest.approx(1.0 + gain / 2)
