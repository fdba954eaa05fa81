"""A calibration without training: the package's plan, search and fit, with outcomes of runs given by a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from internals import (
    Build,
    Calibration,
    Options,
    Run,
    Setting,
    Trials,
    calibrated_recipe,
    next_rate,
    next_setting,
    search_range,
)
from optuna.trial import TrialState

from rankaware_optim import Recipe
from rankaware_optim.fitting import Observation

STEPS = 20  # steps of a run, if nothing depends on them
# a trial's outcome at log2 base rate x
Outcome = Callable[[Calibration, Setting, float], Observation]


@dataclass(frozen=True)
class MadeUp(Run):
    """A run whose observation is given, and not read off its curve."""

    observation: Observation | None = None  # type: ignore[assignment]


def searched(
    options: Options,
    build: Build,
    guess: float,
    run: Outcome,
    budget: int | None = None,
) -> Recipe:
    """Make all trials that the schedule asks for, and return the recipe: see `search`."""
    *_, calibration = search(options, build, guess, run, budget)
    return calibrated_recipe(calibration)


def search(
    options: Options,
    build: Build,
    guess: float,
    run: Outcome,
    budget: int | None = None,
) -> Iterator[Calibration]:
    """Make all trials that the schedule asks for, and yield the calibration after each.

    A run costs its steps, or half of them if it diverged. Nothing is pruned.

    Args:
        options: what is tried.
        build: what the first model would settle.
        guess: octaves added to the first guess of the rate.
        run: (calibration, rank and seed, log2 base rate) -> the outcome.
        budget: most steps of all trials, in place of the number of trials.
    """
    done: list[Run] = []
    calibration = Calibration(options, build, lambda: Trials(done))
    start = calibration.start
    while True:
        payable = options if budget is None else affordable(options, done, budget)
        setting = next_setting(payable, Trials(done))
        if setting is None:
            return
        within = search_range(calibration)
        calibration.start = start + guess
        seen = run(calibration, setting, next_rate(calibration, setting.rank, within))
        calibration.start = start
        steps = options.steps // (1 + math.isinf(seen.value))
        curve = np.linspace(seen.start, seen.tail, steps).tolist()
        state = TrialState.COMPLETE if math.isfinite(seen.value) else TrialState.PRUNED
        done.append(
            MadeUp(*setting, len(done), state, seen.x, curve=curve, observation=seen)
        )
        yield calibration


def affordable(options: Options, done: list[Run], budget: int) -> Options:
    """The options with as many trials as a budget pays for, full ones reserved."""
    search = Trials(done).at(*options.ranks)
    full = options.full_trials - (len(done) - len(search))
    left = budget - sum(len(run.curve) for run in done)
    trials = len(search)
    if left >= (full + 1) * options.steps:
        likely = budget // options.steps - options.full_trials
        trials = max(likely, len(search) + 1)
    return replace(options, trials=trials)
