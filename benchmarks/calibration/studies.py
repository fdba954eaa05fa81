"""A calibration without training: the package's plan, search and fit, with outcomes of runs given by a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from optuna.trial import TrialState

from rankaware_optim import Recipe
from rankaware_optim.calibration import Study
from rankaware_optim.calibration._sampler import BracketSampler
from rankaware_optim.calibration._schedule import Schedule
from rankaware_optim.calibration._trials import TrialRecord, Trials
from rankaware_optim.fitting import Observation

STEPS = 20  # steps of a run, if nothing depends on them
Run = Callable[[TrialRecord, float], Observation]  # a trial's outcome at log2 base rate x


class Simulated(Study):
    """A study that keeps its trials in a list, without a storage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.done: list[TrialRecord] = []
        self._brackets = False

    def trials(self) -> Trials:
        return Trials(self.done)

    def recall(self) -> None:
        """Do nothing: no other worker changes the study."""


def searched(study: Simulated, schedule: Schedule, guess: float, run: Run) -> Recipe:
    """Make all trials that the schedule asks for, and return the recipe.

    A run costs its steps, or half of them if it diverged. Nothing is pruned.

    Args:
        study: the study, with its reference set. Trials are added to it.
        schedule: decides which trials to make.
        guess: octaves added to the first guess of the rate.
        run: (trial, log2 base rate) -> the outcome.
    """
    sampler = BracketSampler(study._start + guess, study.prior, study._fitted, study.full_follows)
    while (cell := schedule.next(study.trials())) is not None:
        trial = TrialRecord(*cell, number=len(study.done))
        low, high = study.range()
        seen = run(trial, min(max(sampler._propose(study.trials(), trial, low, high), low), high))
        steps = study.steps // (1 + seen.stopped)
        curve = np.linspace(seen.start, seen.tail, steps).tolist()
        state = TrialState.COMPLETE if math.isfinite(seen.value) else TrialState.PRUNED
        study.done.append(
            replace(trial, x=seen.x, curve=curve, observation=seen, state=state, value=seen.value)
        )
    return study.recipe()
