"""Tests of the searches that the calibration is compared with, and of finding and fitting recipes."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
from calibration import make_recipes as made
from calibration import plain, searches
from calibration.fit_recipes_again import fitted_again
from study.grids import FULL
from study.moving import by_law

from rankaware_optim import Falling, Recipe


def training(steps: int) -> Any:
    for _ in range(steps):
        yield 1.0
    return 0.5


@pytest.mark.parametrize("stopped", [None, 2])
def test_a_search_counts_its_steps(stopped):
    """The steps of every run are counted, also if it was stopped. A finished run returns its loss."""
    spent = searches.Spent()
    assert searches.scored(searches.counted(training(3), spent)) == 0.5
    run = searches.counted(training(3), spent)
    for _ in itertools.islice(run, stopped):
        pass
    run.close()
    assert spent.steps == 3 + (stopped or 3)


SPANS = {4: (-12.0, -4.0), 16: (-13.0, -5.0), FULL: (-16.0, -8.0)}
WAYS = {  # runs, and the ranks that get a rate of their own
    plain.TPE: (16, {16}),
    plain.GRID: (16, {16}),
    plain.BY_RANK: (16, {*SPANS}),
    plain.EVERY_RANK: (48, {*SPANS}),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_way_takes_the_best_of_its_runs(name):
    """A search returns the learning rate with the lowest mean loss for every rank that it tuned."""
    count, ranks = WAYS[name]
    losses: dict[tuple[int, float], list[float]] = {}
    seeds = []

    def run(rank: int, seed: int, x: float) -> float:
        low, high = SPANS[rank]
        loss = math.inf if x > high - 2 else (x - low - 4 + seed) ** 2
        losses.setdefault((rank, x), []).append(loss)
        seeds.append(seed)
        return loss

    rates = plain.WAYS[name](plain.Task(run, SPANS, (0, 1), seed=0))
    assert len(seeds) == count
    assert seeds.count(0) == seeds.count(1)
    assert set(rates) == ranks
    means = {at: statistics.fmean(each) for at, each in losses.items()}
    for rank, x in rates.items():
        assert means[rank, x] == min(
            loss for at, loss in means.items() if at[0] == rank
        )


def test_a_rank_that_tpe_never_chose_gets_the_best_rate(monkeypatch):
    """If TPE never chose a rank, this rank gets the best learning rate of the other ranks."""
    monkeypatch.setattr(plain, "TRIALS", 1)
    task = plain.Task(lambda rank, seed, x: x, SPANS, (0,), seed=0)
    assert len(set(plain.WAYS[plain.BY_RANK](task).values())) == 1


def test_the_law_moves_the_rate_of_one_rank_only():
    """A search at one rank is converted by the default law.

    If it tuned several ranks, their learning rates stay.
    """
    at = "image_generation", "Init[B], s = 1"
    shift = by_law(*at, Falling())
    moved = plain.moved({16: -8.0}, *at, (4, 16, FULL))
    assert moved == {rank: -8.0 + shift(16, rank) for rank in (4, 16, FULL)}
    tuned = {4: -7.0, 16: -8.0}
    assert plain.moved(tuned, *at, (4, 16)) == tuned


def test_a_recipe_of_every_search_seed_is_found(monkeypatch, tmp_path):
    """The recipes of a configuration are the shipped one followed by those of other seeds, and no others."""
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


@pytest.mark.parametrize(
    "path", sorted(made.RECIPES.glob("*.toml")), ids=lambda p: p.stem
)
def test_a_shipped_recipe_is_the_fit_of_its_trials(path):
    """A new fit to a shipped recipe's trials gives the same learning rate, covariance and ceiling."""
    shipped = Recipe.load(path)
    again = fitted_again(shipped)
    assert again.fitted_lr == pytest.approx(shipped.fitted_lr, rel=1e-9)
    assert np.allclose(again.covariance, shipped.covariance, rtol=1e-9, atol=1e-12)
    assert (again.ceiling or 0) == pytest.approx(shipped.ceiling or 0, rel=1e-9)
