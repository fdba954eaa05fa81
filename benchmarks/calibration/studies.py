"""A calibration without training: the package's plan, search and fit, with outcomes of runs given by a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from internals import (
    Calibration,
    Options,
    Setting,
    Settled,
    TrialRecord,
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
Run = Callable[[Calibration, Setting, float], Observation]


def searched(options: Options, settled: Settled, guess: float, run: Run) -> Recipe:
    """Make all trials that the schedule asks for, and return the recipe: see `search`."""
    *_, calibration = search(options, settled, guess, run)
    return calibrated_recipe(calibration)


def search(
    options: Options, settled: Settled, guess: float, run: Run
) -> Iterator[Calibration]:
    """Make all trials that the schedule asks for, and yield the calibration after each.

    A run costs its steps, or half of them if it diverged. Nothing is pruned.

    Args:
        options: what is tried.
        settled: what the first model would settle.
        guess: octaves added to the first guess of the rate.
        run: (calibration, rank and seed, log2 base rate) -> the outcome.
    """
    done: list[TrialRecord] = []
    calibration = Calibration(options, lambda: Trials(done))
    calibration.settle(settled)
    start = calibration.start
    while (setting := next_setting(options, Trials(done))) is not None:
        within = search_range(calibration)
        calibration.start = start + guess
        seen = run(calibration, setting, next_rate(calibration, setting.rank, within))
        calibration.start = start
        steps = options.steps // (1 + seen.stopped)
        curve = np.linspace(seen.start, seen.tail, steps).tolist()
        state = TrialState.COMPLETE if math.isfinite(seen.value) else TrialState.PRUNED
        done.append(
            TrialRecord(
                *setting, len(done), state, seen.x, curve=curve, observation=seen
            )
        )
        yield calibration
