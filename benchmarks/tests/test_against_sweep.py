"""Searches against a sweep: what a search keeps of its runs, and regret with its units, seeds and costs."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the benchmarks are not at hand"
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def training(steps: int, end: float) -> Any:
    for _ in range(steps):
        yield 1.0
    return end


ENDS = {  # steps taken before it was stopped, what the run ends with: steps and loss that are kept
    "to its end": (None, 0.5, 3, 0.5),
    "diverged": (None, math.inf, 3, None),
    "not a number": (None, math.nan, 3, None),
    "stopped": (2, 0.5, 2, None),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_search_keeps_every_run(load, case):
    """A run is kept with its rate, seed and steps however it ends, and with a loss only where it has one."""
    searches = load("calibration.searches")
    stopped, end, steps, loss = ENDS[case]
    spent: list[Any] = []
    run = searches.clocked(training(3, end), spent, 4, 7, lambda: -9.0)
    if stopped is None:
        for _ in run:
            pass
    else:
        for _ in range(stopped):
            next(run)
        run.close()
    (kept,) = spent
    assert (kept.rank, kept.x, kept.seed, kept.steps, kept.loss) == (
        4,
        -9.0,
        7,
        steps,
        loss,
    )
    assert searches.Run(*json.loads(json.dumps(kept))) == kept


def test_arms_add_up_what_runs_took(load):
    """Steps and seconds of a rank are the sums of its runs, read from a file or not."""
    searches = load("calibration.searches")
    runs = [
        (4, -9.0, 0, 10, 1.0, 0.5),
        (4, None, 1, 5, 0.5, None),
        (0, -12.0, 0, 3, 0.9, 0.4),
    ]
    assert searches.by_arm(runs) == {4: (15, 1.5), 0: (3, 0.9)}


def test_regret_has_units_and_seeds(load):
    """Regret is a share of the gain, on all scoring seeds and on each. Beside it is a difference of losses."""
    scores = load("calibration.against_sweep_scores")
    job = load("study.grids").Job
    cell = ("image_generation", "Init[A], s = 1", 4)
    losses = {-9.0: (0.2, 0.2, 0.2), -8.0: (0.3, 0.2, 0.4)}
    done = {
        job(*cell, x, seed): loss
        for x, each in losses.items()
        for seed, loss in zip((3, 4, 5), each, strict=True)
    }
    found = scores.score(
        done, 1.2, ("Init[A], s = 1", "x", 4), (cell, -8.0), (cell, -9.0)
    )
    assert (found.domain, found.name, found.rank) == ("image_generation", "x", 4)
    assert (found.regret, found.loss) == pytest.approx((0.1, 0.1))
    assert found.by_seed == pytest.approx((0.1, 0.0, 0.2))


def test_a_recipe_of_every_search_seed_is_found(load, monkeypatch, tmp_path):
    """The shipped recipe comes first, then those of other seeds; another configuration's are not among them."""
    made = load("calibration.make_recipes")
    monkeypatch.setattr(made, "RECIPES", tmp_path / "shipped")
    monkeypatch.setattr(made, "OTHER_SEEDS", tmp_path / "others")
    of = ("image_generation", "Init[A], s = 1")
    wanted = [made.path_of(*of, seed) for seed in (0, 1, 2)]
    assert made.paths_of(*of) == []
    for path in (
        *wanted,
        made.path_of(of[0], "Init[A], s = 1/r", 1),
        made.path_of(of[0], "Init[B], s = 1", 0),
    ):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert made.paths_of(*of) == wanted
