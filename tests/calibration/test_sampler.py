"""Where the sampler sends the next trial, given what a study holds: finished runs and those of other workers."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from rankaware_optim.calibration._search import (
    between,
    next_bracket,
    next_rate,
    next_refinement,
)
from rankaware_optim.calibration._trials import PARAMETER, TrialRecord, Trials
from rankaware_optim.fitting import Observation

START, LOW, HIGH = -6.5, -10.5, -2.5
RANGE = {PARAMETER: FloatDistribution(LOW, HIGH)}


def trial_of(
    rank: int, x: float, value: float | None = None
) -> optuna.trial.FrozenTrial:
    """A finished run, or without a value one that another worker has under way."""
    attributes = {"rank": rank, "seed": 0}
    if value is None:
        return create_trial(
            state=TrialState.RUNNING,
            params={PARAMETER: x},
            distributions=RANGE,
            user_attrs=attributes,
        )
    seen = Observation(rank, 0, x, value, start=1.0, tail=value)
    attributes |= {"observation": asdict(seen), "curve": [1.0, value]}
    return create_trial(
        value=value, params={PARAMETER: x}, distributions=RANGE, user_attrs=attributes
    )


def proposed(*trials: optuna.trial.FrozenTrial, rank: int = 2) -> float:
    """The rate that a trial at `rank` gets."""
    seen = Trials(map(TrialRecord.read, trials))
    calibration = SimpleNamespace(
        start=START, fit=lambda: None, trials=lambda: seen, options=None
    )
    return next_rate(calibration, rank, (LOW, HIGH))


@pytest.mark.parametrize(
    ("trials", "rank", "expected"),
    [
        ((), 2, START),
        ((trial_of(2, START),), 2, START - 2),
        ((trial_of(2, START),), 32, START - 2),
        ((trial_of(2, START, 0.5),), 32, START + 2),
        ((trial_of(2, START, 0.5), trial_of(32, START + 2)), 2, START - 2),
        ((trial_of(32, START, 0.5), trial_of(32, START + 2)), 2, START),
        (
            (
                trial_of(2, START, 0.5),
                trial_of(2, START - 2, 0.6),
                trial_of(32, START + 2),
            ),
            2,
            START - 4,
        ),
    ],
)
def test_no_rank_tries_a_rate_twice_while_others_work(trials, rank, expected):
    """The search outwards skips what others run, and what this rank itself has run."""
    assert proposed(*trials, rank=rank) == pytest.approx(expected)


def test_many_workers_begin_at_as_many_rates():
    """Forty that start before any run has ended are spread over the range, each at its own rate."""
    begun: list[float] = []
    for _ in range(40):
        begun.append(proposed(*(trial_of(2, x) for x in begun)))
    assert len(set(begun)) == 40
    assert all(LOW <= x <= HIGH for x in begun)
    assert max(b - a for a, b in pairwise(sorted(begun))) <= 1.0


def test_a_run_above_one_that_diverged_is_no_best():
    """A lucky run between two rates that diverged brackets nothing: the search goes on below them."""
    lost = Observation(2, 0, START + 2, math.inf, 1.0, math.inf, stopped=True)
    seen = [Observation(2, 0, START, 0.5, 1.0, 0.5), lost, replace(lost, x=START - 2)]
    assert next_bracket(seen, START - 10, START + 10) == START - 4
    below = Observation(2, 0, START - 4, 0.3, 1.0, 0.3)
    assert next_bracket([*seen, below], START - 10, START + 10) == START - 6


@pytest.mark.parametrize("centre", [-9.5, -6.0, -3.0])
def test_refinement_goes_to_no_rate_twice(centre):
    """Near an edge of the range too, five refinements of a rank are five new rates, all in the range."""
    rates = [centre]
    for _ in range(5):
        rates.append(next_refinement(rates, centre, (LOW, HIGH)))
    assert len(set(rates)) == len(rates)
    assert all(LOW <= x <= HIGH for x in rates)


def test_refinement_stays_between_rates_that_were_pruned():
    """Wherever the law puts its optimum, a rank tries nothing beyond a rate pruned on that side of its best."""
    seen, pruned = [Observation(2, 0, -5.0, 0.5, 1.0, 0.5)], [-3.7, -1.1]
    for _ in range(3):
        tried = [*pruned, *(run.x for run in seen)]
        x = next_refinement(tried, -2.0, between(seen, pruned))
        assert x < -3.7
        seen.append(Observation(2, 0, x, 0.6, 1.0, 0.6))
