"""The rule by which the default law in a family of optimizers is chosen, on made-up moves and bowls."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ..helpers.optimizers import needs_muon

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


@needs_muon
def test_the_default_law_is_what_the_rule_says_of_the_runs(law_check):
    """What the package does in every family that was swept is what the rule makes of the results on file."""
    from study.runs_on_file import read

    from rankaware_optim.laws import FORMS

    moves = json.loads((law_check.RESULTS / "law_check.json").read_text())["moves"]
    moves = [{**move, "lost": math.inf if move["lost"] is None else move["lost"]} for move in moves]
    done, by_rule = read(law_check.STORE), {}
    for family, names in law_check.families().items():
        by_rule[family] = law_check.default_of(*law_check.judged(done, names, moves))
    words = dict(zip(("one rate", "one rank", "form"), law_check.CANDIDATES, strict=True))
    assert by_rule == {family: words[FORMS[family].default] for family in by_rule}
    assert FORMS["first-step"].default == "one rate"  # it was not run, and the form at one rank did not help everywhere
    assert law_check.BY_ALPHA not in by_rule["relative-scale"]
