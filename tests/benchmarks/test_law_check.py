"""The rule by which the default law in a family of optimizers is chosen, on made-up moves and bowls."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not at hand")


@pytest.fixture
def law_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("laws.law_check")
    sys.modules.pop("laws.law_check", None)


# Error in octaves and the losses of two moves: on target, within .1 octaves of that, off without a loss, and with one.
GOOD, NEAR, FAIR, BAD = (0.1, (0.0, 0.01)), (0.15, (0.0, 0.01)), (0.4, (0.0, 0.01)), (2.0, (0.1, math.inf))
# What one rate, the form at one rank and the form do, each at alpha = rank and at alpha = 16; which the rule chooses.
CHOICES = {
    "the form alone lands": ((BAD, BAD), (BAD, BAD), (GOOD, GOOD), 2),
    "a tie": ((GOOD, GOOD), (GOOD, GOOD), (GOOD, GOOD), 0),
    "alpha is to move the rate, rank is not": ((GOOD, BAD), (GOOD, GOOD), (FAIR, GOOD), 1),
    "the form loses more at alpha = rank": ((GOOD, BAD), (GOOD, FAIR), (BAD, GOOD), 1),
    "two that land": ((FAIR, BAD), (NEAR, NEAR), (GOOD, GOOD), 1),
    "no lower error": ((GOOD, BAD), (GOOD, BAD), (BAD, GOOD), 0),
    "more lost, within the floor": ((FAIR, FAIR), (FAIR, FAIR), (GOOD, (0.1, (0.001, 0.011))), 2),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_rule_takes_the_simplest_that_helps(law_check, case):
    """The default is what moves best without losing more than one rate anywhere, and of equals the simplest."""
    *made, expected = CHOICES[case]
    moves = [
        {"law": law, "arm": arm, "error": error, "lost": lost}
        for law, arms in zip(law_check.CANDIDATES, made, strict=True)
        for arm, (error, losses) in zip((law_check.BY_RANK, law_check.AT_16), arms, strict=True)
        for lost in losses
    ]
    floors = {law_check.BY_RANK: [0.001, 0.002], law_check.AT_16: [0.001, 0.002]}
    assert law_check.default_of(moves, floors) == law_check.CANDIDATES[expected]


@pytest.mark.parametrize(("best", "expected"), [((0.0, 0.0), 0.0), ((0.0, 1.0), 0.1), ((0.0,), 0.0)])
def test_the_floor_is_what_the_choice_loses_on_another_seed(law_check, best, expected):
    """Seeds that agree put the floor at nothing; ones an octave apart at what an octave loses of the gain."""
    from study.configurations import START
    from study.grids import FULL, Job

    cell = ("network", "Muon", 4)
    start = {Job("network", START, FULL, 0.0, 0): 2.0}
    bowls = {Job(*cell, x, seed): 1.0 + (x - at) ** 2 / 10 for x in range(-4, 5) for seed, at in enumerate(best)}
    assert law_check.floor(start | bowls, cell) == pytest.approx(expected)


def test_at_one_rank_alpha_moves_a_rate_and_the_rank_does_not(law_check):
    """The form at one rank keeps a rate where alpha follows the rank, and undoes a change of alpha as the form does."""
    import torch

    from rankaware_optim import Factor, MuA, Reference

    law, at = law_check.OneRank().bind(torch.optim.SGD, {}), Reference(rank=16, alpha=16, fan_in=64)
    there = {s: Factor("w", "A", 64, 64, 64, scaling=s) for s in (1.0, 0.25)}
    same = Factor("w", "A", 16, 64, 64, scaling=0.25)
    assert law.multiplier(there[1.0], at) == 1.0
    assert law.multiplier(there[0.25], at) == MuA().bind(torch.optim.SGD, {}).multiplier(same, at)
