"""Searches at the runs of a calibration and more, simulated on the sweeps at a task's own steps, and the recipes on file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from typing import NamedTuple

import torch
from calibration.make_recipes import paths_of, rate_of
from calibration.plain import (
    BY_RANK,
    EVERY_RANK,
    GRID,
    TPE,
    TRIALS,
    WAYS,
    Task,
    moved,
)
from calibration.simulated import (
    DEFAULT,
    WITH_FULL,
    build_of,
    calibrated,
    drawn,
    loss,
    options_of,
    own_rate,
)
from calibration.surfaces import Surface, study_surfaces
from frontier.scores import OURS, Sweeps, own_steps
from internals import Calibration, Trials, search_range
from study.configurations import CONFIGS
from study.domains import HELD_OUT, STUDY
from study.grids import FULL

from rankaware_optim import RankAwareWarning, Recipe

CALIBRATION = f"a calibration: {TRIALS} trials at two ranks"
FULL_TRIALS = "the same, three of them in full"
PLANS = {CALIBRATION: DEFAULT, FULL_TRIALS: WITH_FULL}
RECIPES = "a recipe on file, real runs"
GRIDS = "the whole grid, a seed"
DRAWS = 10
# in words, and who advises it
SETTINGS = {
    CALIBRATION: ("`ra.calibrate`, the lowest and the highest rank", OURS),
    FULL_TRIALS: ("`full_trials=3`", OURS),
    RECIPES: (
        "the same at a fifth of a sweep's steps and three full runs",
        OURS,
    ),
    TPE: ("Optuna's sampler in the octaves where a calibration begins", "Optuna"),
    GRID: ("an octave apart; the best mean", "what one would do by hand"),
    BY_RANK: ("the rank a categorical parameter", "Optuna"),
    EVERY_RANK: ("a study at each rank and in full", "Optuna"),
    GRIDS: (
        "nine rates an octave apart at each rank and in full",
        "what a paper would do",
    ),
}


class Searched(NamedTuple):
    """The rates that a search names: log2, by rank. It has seen these seeds, and cost so many runs."""

    way: str
    task: str
    config: str
    rates: dict[int, float]
    seen: tuple[int, ...]
    runs: float


@cache
def surfaces() -> list[Surface]:
    return list(study_surfaces((*STUDY, *HELD_OUT)))


def simulated(workers: int) -> list[Searched]:
    """Every search on every surface, drawn ten times."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(chain.from_iterable(pool.map(on_surface, range(len(surfaces())))))


def on_surface(index: int) -> list[Searched]:
    torch.set_num_threads(1)
    # extrapolations are asked for on purpose
    warnings.simplefilter("ignore", RankAwareWarning)
    on, found = surfaces()[index], []
    for draw in range(DRAWS):
        seed = (index, draw)
        seen, _ = drawn(on, seed)
        made = partial(Searched, task=on.domain, config=on.config, seen=seen)
        for name, plan in PLANS.items():
            recipe = calibrated(on, plan, seed)
            found.append(made(name, rates=rates_of(recipe, on), runs=TRIALS))
        for name in WAYS:
            arms = len(on.ranks) + 1 if name == EVERY_RANK else 1
            found.append(made(name, rates=by_way(on, name, seed), runs=TRIALS * arms))
    return found


def by_way(on: Surface, name: str, seed: Sequence[int]) -> dict[int, float]:
    """log2 of the rates of a way that a user would write with Optuna."""
    seeds, guess = drawn(on, seed)
    options = options_of(on, DEFAULT, seeds)
    study = Calibration(options, build_of(on, options), Trials)
    ends = [end + guess for end in search_range(study)]
    spans = {}
    for rank in (*on.ranks, FULL):
        low, high = (own_rate(on, study, rank, end) for end in ends)
        spans[rank] = low, high
    rates = WAYS[name](Task(partial(loss, on), spans, seeds, seed[-1]))
    return moved(rates, on.domain, on.config, (*on.ranks, FULL))


def rates_of(recipe: Recipe, on: Surface) -> dict[int, float]:
    ranks = (*on.ranks, FULL)
    return {rank: rate_of(recipe, on.config, rank)[0] for rank in ranks}


def recipes_on_file() -> Iterator[Searched]:
    """The rates of real calibrations, on seeds that are not the sweep's."""
    for on in surfaces():
        for path in paths_of(on.domain, on.config):
            recipe = Recipe.load(path)
            runs = len(recipe.tensors["value"])
            rates = rates_of(recipe, on)
            yield Searched(RECIPES, on.domain, on.config, rates, (), runs)


def whole_grids() -> Iterator[Searched]:
    """The best rate of every rank, by the sweep of each seed."""
    for on in own_steps():
        for config in CONFIGS:
            yield from whole_grid(on, config)


def whole_grid(on: Sweeps, config: str) -> Iterator[Searched]:
    targets = on.targets(config)
    best = {rank: on.best_by_seed(config, rank) for rank in targets}
    runs = 9 * (len(targets) + 1)
    for seed in range(on.seeds(config, FULL)):
        rates = {rank: each[seed] for rank, each in best.items()}
        yield Searched(GRIDS, on.task, config, rates, (seed,), runs)
