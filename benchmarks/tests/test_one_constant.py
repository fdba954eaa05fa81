"""The experiment of one constant a task: its equations, its estimators on made-up bowls, and which runs it asks for."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the benchmarks are not at hand"
)
CELL = ("language", "full | as it is", 0)


@pytest.fixture
def one_constant(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("laws.one_constant")
    monkeypatch.setattr(module, "width", lambda domain: 256.0)
    yield module
    sys.modules.pop("laws.one_constant", None)


def loss(x: float, seed: int, best: float) -> float:
    """A bowl with a cliff an octave above its lowest, which seeds raise."""
    return (
        1.0 + (x - best) ** 2 / 20 + 0.01 * seed + (math.inf if x > best + 2 else 0.0)
    )


def run(
    one_constant: Any, guess: int, best: float
) -> tuple[dict[Any, float | None], int]:
    """All runs that a cell asks for, and how often it asked."""
    task, done, asked = one_constant.Around(CELL, guess), {}, 0
    while jobs := task.wanted(done):
        asked += 1
        found = {job: loss(job.x, job.seed, best) for job in jobs}
        done |= {
            job: value if math.isfinite(value) else None for job, value in found.items()
        }
    return done, asked


@pytest.mark.parametrize(
    "config", ["Init[A], s = 1", "Init[A], s = 1/r", "Init[B], s = 1", "full"]
)
@pytest.mark.parametrize("x", [-14.0, -9.0, -4.0])
def test_a_constant_and_its_rate_are_inverse(one_constant, config, x):
    """The rate at the constant of a rate is that rate, in every configuration."""
    c = one_constant.constant_of("language", config, x)
    assert one_constant.rate_at("language", config, c) == pytest.approx(x)


def test_where_the_product_rules_full_finetuning_moves_twice_as_far(one_constant):
    """At a large κ(n)·τ an octave of Init[A] is two of full finetuning; the ratio law gives one."""
    moved = [one_constant.one_constant("language", "full", x) for x in (4.0, 5.0)]
    kept = [one_constant.ratio("language", "full", x) for x in (4.0, 5.0)]
    assert moved[1] - moved[0] == pytest.approx(2.0, abs=0.01)
    assert kept[1] - kept[0] == pytest.approx(1.0)


@pytest.mark.parametrize("guess", [-9, -7, -13])
def test_runs_go_where_the_best_rate_is(one_constant, guess):
    """Whole octaves of one seed grow from the guess until the lowest is inside; half octaves of all seeds follow."""
    done, asked = run(one_constant, guess, best=-9.2)
    fine = {job.x for job in done if job.seed}
    assert fine == {-10.0, -9.5, -9.0, -8.5, -8.0}
    assert asked <= 8


def test_both_estimators_find_a_bowl(one_constant):
    """The basin's middle is the bowl's, the cliff where a tenth of the gain is lost, neither known to the seeds."""
    done, _ = run(one_constant, -9, best=-9.0)
    found = one_constant.estimate(done, CELL, start=2.0)
    assert found.middle == pytest.approx(-9.0, abs=0.05)
    gain = 2.0 - min(found.means.values())
    assert found.cliff == pytest.approx(-9.0 + math.sqrt(0.1 * gain * 20), abs=0.1)


def test_a_cell_cut_short_has_no_estimate(one_constant):
    """Without the half octaves of every seed nothing is estimated."""
    done, _ = run(one_constant, -9, best=-9.0)
    assert (
        one_constant.estimate(
            {job: v for job, v in done.items() if job.seed < 2}, CELL, 2.0
        )
        is None
    )


def test_four_times_the_batch_has_one_seed(one_constant):
    """Where a run costs four, whole octaves from one to either side and half octaves of one seed are an estimate."""
    cell, arm, done = (
        ("language", "full | batch × 4", 0),
        one_constant.ARMS["batch × 4"],
        {},
    )
    while jobs := one_constant.Around(cell, -9, arm.seeds, arm.wide).wanted(done):
        done |= {job: loss(job.x, job.seed, best=-9.0) for job in jobs}
    assert sorted(job.x for job in done) == [-10.0, -9.5, -9.0, -8.5, -8.0]
    assert one_constant.estimate(done, cell, 2.0, arm.seeds).middle == pytest.approx(
        -9.0, abs=0.05
    )
