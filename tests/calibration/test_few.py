"""Tests of a search of four trials at one rank, which takes the vertex of a parabola as its learning rate."""

from __future__ import annotations

import math

import pytest

from rankaware_optim.calibration._constants import CAP
from rankaware_optim.calibration._few import vertex_of

from ..helpers.calibrations import BEST, Net, calibrate


def bowl_at(best):
    """Return a loop whose score is a parabola in log2 of the learning rate with its minimum at `best`."""

    def train(trial):
        trial.optimizer(Net(trial.rank))
        end = 1.0 + 0.1 * (math.log2(trial.lr) - best) ** 2
        for step in range(trial.steps):
            yield 2.3 + (end - 2.3) * min(2 * (step + 1) / trial.steps, 1.0)
        return end

    return train


def octaves_to(rate, end):
    return abs(math.log2(end / rate.lr))


@pytest.mark.parametrize("ranks", [(16,), (None,)])
def test_four_trials_find_the_vertex_without_a_margin(ranks):
    """If the trials bracket the best learning rate, the recipe has this learning rate, no margin and a capped interval."""
    start = (2.0 ** (BEST - 2), 2.0 ** (BEST + 2.5))
    recipe = calibrate(bowl_at(BEST), ranks=ranks, trials=4, lr_range=start)
    assert len(recipe.tensors["lr"]) == 4
    at = recipe.at(method="full") if ranks == (None,) else recipe.at(16)
    assert math.log2(at.lr) == pytest.approx(BEST, abs=0.1)
    assert recipe.margin == 0.0
    for end in (at.low, at.high):
        assert octaves_to(at, end) <= CAP + 1e-6


def test_an_unbracketed_search_has_a_capped_interval():
    """If all trials are on one side of the best learning rate, the width of the interval is capped."""
    low = (2.0 ** (BEST - 12), 2.0 ** (BEST - 9))
    at = calibrate(bowl_at(BEST), ranks=(16,), trials=4, lr_range=low).at(16)
    assert octaves_to(at, at.high) <= CAP + 1e-6


@pytest.mark.parametrize(
    "options", [{"trials": 8}, {"trials": 4, "target_steps": 160}, {"ranks": (4, 16)}]
)
def test_other_searches_keep_the_fit_and_its_margin(options):
    """With more trials, several ranks, or trials of one eighth of the run, the recipe has the margin of the usual fit."""
    recipe = calibrate(bowl_at(BEST), **{"ranks": (16,), "trials": 8} | options)
    assert recipe.margin > 0


def test_the_vertex_needs_both_neighbours():
    """`vertex_of` gives a vertex only if the best value has a finite neighbour on each side."""
    assert vertex_of({0.0: 1.0, 1.0: 2.0, 2.0: 3.0}) is None
    assert vertex_of({0.0: 3.0, 1.0: 2.0, 2.0: math.inf}) is None
    assert vertex_of({0.0: math.inf, 1.0: 2.0, 2.0: 3.0}) is None
    assert vertex_of({0.0: 2.0, 1.0: 1.0, 3.0: 5.0}) == pytest.approx(1.0)


def test_of_equal_lowest_values_the_lowest_learning_rate_is_the_middle():
    """If two trials share the lowest value, the parabola goes through the one with the lower learning rate."""
    assert vertex_of({0.0: 3.0, 1.0: 2.0, 2.0: 2.0, 3.0: 9.0}) == pytest.approx(1.5)
    assert vertex_of({0.0: 2.0, 1.0: 2.0, 2.0: 2.0}) is None
