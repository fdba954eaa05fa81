"""Searches against a sweep: what a search keeps of its runs, and regret with its units, seeds and costs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from calibration import against_sweep_scores as scores
from calibration import make_recipes as made
from calibration import searches
from study.grids import Job


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
def test_a_search_keeps_every_run(case):
    """A run is kept with its rate, seed and steps however it ends, and with a loss only where it has one."""
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


def test_regret_has_units_and_seeds():
    """Regret is a share of the gain, on all scoring seeds and on each. Beside it is a difference of losses."""
    cell = ("image_generation", "Init[A], s = 1", 4)
    losses = {-9.0: (0.2, 0.2, 0.2), -8.0: (0.3, 0.2, 0.4)}
    done = {
        Job(*cell, x, seed): loss
        for x, each in losses.items()
        for seed, loss in zip((3, 4, 5), each, strict=True)
    }
    found = scores.score(
        done, 1.2, ("Init[A], s = 1", "x", 4), (cell, -8.0), (cell, -9.0)
    )
    assert (found.domain, found.name, found.rank) == ("image_generation", "x", 4)
    assert (found.regret, found.loss) == pytest.approx((0.1, 0.1))
    assert found.by_seed == pytest.approx((0.1, 0.0, 0.2))


def test_a_recipe_of_every_search_seed_is_found(monkeypatch, tmp_path):
    """The shipped recipe comes first, then those of other seeds; another configuration's are not among them."""
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
