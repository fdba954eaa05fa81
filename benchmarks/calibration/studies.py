"""A calibration without training: the package's own plan, search and fit, on runs that somebody makes up."""

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
from rankaware_optim.calibration.fit import Observation

STEPS = 20  # of a run, where nothing depends on it
Run = Callable[[TrialRecord, float], Observation]  # a trial's outcome at log2 base rate x


class Simulated(Study):
    """A study that keeps its trials itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.done: list[TrialRecord] = []
        self._brackets = False

    def trials(self) -> Trials:
        return Trials(self.done)

    def recall(self) -> None:
        """Nobody else works on it."""


def searched(study: Simulated, schedule: Schedule, guess: float, run: Run) -> Recipe:
    """The recipe of all trials that the schedule asks for; `guess` octaves are added to the first one's rate.

    A run costs its steps, and half of them where it diverged. Nothing is pruned.
    """
    sampler = BracketSampler(study._start + guess, study.prior, study._fitted, study.kind)
    while (cell := schedule.next(study.trials())) is not None:
        trial = TrialRecord(*cell, number=len(study.done))
        low, high = study.range()
        seen = run(trial, min(max(sampler._propose(study.trials(), trial, low, high), low), high))
        steps = (cell.steps or study.steps[0]) // (1 + seen.stopped)
        curve = np.linspace(seen.start, seen.tail, steps).tolist()
        state = TrialState.COMPLETE if math.isfinite(seen.value) else TrialState.PRUNED
        seen = replace(seen, steps=cell.steps, batch=cell.batch)
        study.done.append(replace(trial, x=seen.x, curve=curve, observation=seen, state=state, value=seen.value))
    return study.recipe()
