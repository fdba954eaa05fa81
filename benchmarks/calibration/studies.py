"""A calibration without training: the package's plan, search and fit, with outcomes of runs given by a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from internals import (
    BracketSampler,
    Calibration,
    Options,
    TrialRecord,
    Trials,
    calibrated_recipe,
    search_range,
)
from optuna.trial import TrialState

from rankaware_optim import Recipe
from rankaware_optim.fitting import Observation

STEPS = 20  # steps of a run, if nothing depends on them
# a trial's outcome at log2 base rate x
Run = Callable[[TrialRecord, float], Observation]


class Simulated(Calibration):
    """A calibration that keeps its trials in a list, without a storage."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.done: list[TrialRecord] = []

    def trials(self) -> Trials:
        return Trials(self.done)

    def recall(self) -> None:
        """Do nothing: no other worker changes the study."""


def searched(study: Simulated, guess: float, run: Run) -> Recipe:
    """Make all trials that the schedule asks for, and return the recipe.

    A run costs its steps, or half of them if it diverged. Nothing is pruned.

    Args:
        study: the calibration, with its reference set. Trials are added to it.
        guess: octaves added to the first guess of the rate.
        run: (trial, log2 base rate) -> the outcome.
    """
    sampler, start = BracketSampler(study), study.start
    while (setting := study.schedule.next(study.trials())) is not None:
        trial = TrialRecord(*setting, number=len(study.done))
        within = search_range(study)
        study.start = start + guess
        seen = run(trial, sampler.propose(trial, *within))
        study.start = start
        curve = np.linspace(
            seen.start, seen.tail, study.schedule.steps // (1 + seen.stopped)
        )
        state = TrialState.COMPLETE if math.isfinite(seen.value) else TrialState.PRUNED
        study.done.append(
            replace(
                trial, x=seen.x, curve=curve.tolist(), observation=seen, state=state
            )
        )
    return calibrated_recipe(study)
