"""Pruning of runs that are clearly worse than the best run of the same rank and seed at the same
step.

Runs of one seed see the same batches, so the difference of two curves is much less noisy than
either curve.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..fitting import CLEAR, EARLY
from ._trials import TrialRecord, Trials

_WORSE = 0.5  # a run is pruned if it lags by this share of the best run's gain so far
_NEAR = 1.0  # octaves around the best run and the estimated optimum in which nothing is pruned
_STANDARD_ERRORS = 3.0
_JUDGED = 3  # number of last reports that are compared


class PairedPruner(BasePruner):
    """Stops a run that lags the best run of its rank and seed by half of the gain of that run at
    the same step.

    Runs whose rate is within an octave of the best run's or of the estimated optimum are never
    pruned. Differences that noise explains are ignored. So is a best run that gained no more than
    its noise, since its curve shows no learning.

    Args:
        steps: steps of a whole run.
        warmup: share of the steps, from 0 to 1. Nothing is pruned before its end, nor in the first
            30 %.
    """

    def __init__(self, steps: int, warmup: float = 0.0) -> None:
        self._steps, self._from = steps, max(EARLY, warmup)

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        record = TrialRecord.read(trial)
        if trial.last_step is None or trial.last_step < self._from * self._steps:
            return False
        best = Trials.read(study.get_trials(deepcopy=False), record.cell).rival_of(record)
        if best is None or record.x is None:
            return False
        is_near = any(
            mark is not None and abs(record.x - mark) < _NEAR for mark in (best.x, record.estimate)
        )
        steps = sorted(record.reports.keys() & best.reports.keys())[-_JUDGED:]
        if is_near or len(steps) < 2 or best.observation is None:
            return False
        # Each of the last paired differences must exceed the margin, and their mean must exceed the
        # noise.
        least = CLEAR * best.observation.noise
        gaps = [record.reports[s] - best.reports[s] for s in steps]
        gains = [best.observation.start - best.reports[s] for s in steps]
        clearly = all(
            gain > least and gap > _WORSE * gain for gap, gain in zip(gaps, gains, strict=True)
        )
        return clearly and fmean(gaps) > _STANDARD_ERRORS * stdev(gaps) / math.sqrt(len(gaps))
