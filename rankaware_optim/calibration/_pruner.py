"""When a run is stopped: as diverged, above a limit, or as pruned, clearly worse than the best run
of the same rank and seed at the same step.

Runs of one seed see the same batches, so the difference of two curves is much less noisy than
either curve.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..fitting import CLEAR, EARLY, TAIL, best_fall, recent, usual_noise
from ._trials import Setting, TrialRecord, Trials

_WORSE = 0.5  # a run is pruned if it lags by this share of the best run's gain so far
_NEAR = 1.0  # octaves around the best run and the estimated optimum in which nothing is pruned
_DIGITS = 6  # of a distance: rates lie whole octaves apart, up to rounding
_STANDARD_ERRORS = 3.0
_JUDGED = 3  # number of last reports that are compared


def divergence_limits(trials: Trials, setting: Setting, steps: int) -> list[float]:
    """Return, for each step, the mean of recent values above which a run is stopped as diverged.

    The limit is a margin above the usual start of the runs: half the best gain, or what the noise
    of the curves explains. Batches may be hard, so it is at least that margin above the loss of a
    run that learns nothing, which is at most one gain above the best run on the same batches. The
    usual start is a mean of first values, since a single one may be low by chance.

    Args:
        trials: those that count.
        setting: rank and seed of the run.
        steps: those of a whole run.
    """
    observations = trials.observations()
    gain = best_fall(observations) or math.inf
    margin = max(gain / 2, CLEAR * usual_noise(observations))
    flat = trials.usual_height() + margin
    beside = trials.curve_beside(setting)
    limits = []
    for end in range(1, steps + 1):
        window = beside[max(0, end - TAIL) : end]
        limits.append(max(flat, recent(window) + gain + margin) if window else flat)
    return limits


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
        self._first = max(EARLY, warmup) * steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        if trial.last_step is None or trial.last_step < self._first:
            return False
        record = TrialRecord.read(trial)
        best = _rival(study, record)
        if best is None or record.x is None:
            return False
        for mark in (best.x, record.estimate):
            if mark is not None and round(abs(record.x - mark), _DIGITS) < _NEAR:
                return False
        return _lags(record, best)


def _rival(study: Study, record: TrialRecord) -> TrialRecord | None:
    """Return the best finished run of a trial's rank and seed."""
    paired = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        if (attributes.get("rank"), attributes.get("seed", 0)) == record.setting:
            paired.append(trial)
    return Trials.read(paired).best_of(record.setting)


def _lags(record: TrialRecord, best: TrialRecord) -> bool:
    """Return whether each of the last paired differences exceeds the margin, and their mean the
    noise.
    """
    steps = sorted(record.reports.keys() & best.reports.keys())[-_JUDGED:]
    if len(steps) < 2 or best.observation is None:
        return False
    least = CLEAR * best.observation.noise
    gaps = []
    for step in steps:
        gap = record.reports[step] - best.reports[step]
        gain = best.observation.start - best.reports[step]
        if gain <= least or gap <= _WORSE * gain:
            return False
        gaps.append(gap)
    return fmean(gaps) > _STANDARD_ERRORS * stdev(gaps) / math.sqrt(len(gaps))
