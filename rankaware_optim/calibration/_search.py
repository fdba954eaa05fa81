"""How a calibration searches with Optuna: a sampler that brackets the optimum of one rank and then
measures around it at all ranks, and a pruner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from statistics import fmean, stdev
from typing import Any

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..fitting import (
    CLEAR,
    EARLY,
    TAIL,
    Observation,
    all_rose,
    below_cliff,
    best_fall,
    gain_of,
    none_learned,
    recent,
    usual_noise,
)
from ._calibration import Calibration
from ._trials import Setting, TrialRecord, Trials

_STRIDE = 2.0  # octaves between the trials that bracket
_UPWARDS = 3  # runs before the search turns downwards if none of them learned
_CLEARLY = 0.25  # share of the gain by which a rate above the best is clearly worse
# Offsets from the estimated optimum, octaves, in order. The low side is safer, since the loss rises
# faster above.
_OFFSETS = ((0.5, -1.0, 1.25, -2.0), (0.0, -0.5, -1.5, 0.85))
_CLEARANCE = 0.5  # octaves to stay below the lowest rate that diverged
_TAKEN = 0.25  # octaves to stay away from rates that another worker is running or this rank has run
_WIDEN = 2.0  # octaves by which an edge moves if the best rate is there
_EDGE = 1.0  # octaves from an edge that count as being there
_FULL_STEP = 1.0  # octaves between runs of full finetuning after the search
_HALF_RANGE = 4.0  # octaves on either side of the first guess
_WORSE = 0.5  # a run is pruned if it lags by this share of the best run's gain so far
_NEAR = 1.0  # octaves around the best run and the estimated optimum in which nothing is pruned
_DIGITS = 6  # of a distance: rates lie whole octaves apart, up to rounding
_STANDARD_ERRORS = 3.0
_JUDGED = 3  # number of last reports that are compared


class BracketSampler(BaseSampler):
    """Moves outwards from the first rate until it has seen the cliff above and a rate below the
    best, then refines.

    Rates are bracketed at the rank of the first run, since losses of different ranks cannot be
    compared. Refinement uses eight offsets from the fitted optimum and takes the one that is
    farthest from the rates tried at the rank. A rate that another worker is running counts as
    tried. The state is read from the study, so a resumed study continues in the same way.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, Any]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Any
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> float:
        low, high = param_distribution.low, param_distribution.high
        return self.propose(TrialRecord.read(trial), low, high)

    def propose(self, trial: TrialRecord, low: float, high: float) -> float:
        """Return log2 of the rate of a trial."""
        return float(min(max(self._propose(trial, low, high), low), high))

    def _propose(self, trial: TrialRecord, low: float, high: float) -> float:
        calibration = self._calibration
        trials = calibration.trials()
        rank = trial.rank
        running = trials.running(but=trial.number)
        tried = Trials((*trials.counted(), *running)).at(rank).rates()
        taken = [*running.rates(), *tried]
        observations = trials.observations()
        if not observations:
            return _beside(calibration.start, taken, low, high)
        fit = calibration.fit()
        if fit is not None and rank is None and calibration.schedule.full_trials:
            return _next_full(trials, tried, fit.best(rank))
        anchor = observations[0].rank
        proposed = None
        if rank == anchor or fit is None:
            of_anchor = trials.at(anchor)
            proposed = next_bracket(
                of_anchor.observations(), low, high, of_anchor.pruned()
            )
        if proposed is None and fit is not None:
            bottom, top = between(
                trials.at(rank).observations(), trials.at(rank).pruned()
            )
            within = max(low, bottom), min(high, _under(fit.ceiling), top)
            return next_refinement(tried, fit.best(rank), within)
        if proposed is None:
            proposed = min(observations, key=lambda run: run.x).x - _STRIDE
        return _beside(proposed, taken, low, high)


def search_range(calibration: Calibration) -> tuple[float, float]:
    """Return the range of log2 rates: as given or around the first guess, widened while a best rate
    is at an edge.

    It is computed from the trials each time, so that a resumed study has the same one. Best rates
    are those of each rank, below the rates that diverged there. Where all runs rose, the lowest
    rate counts as the best.
    """
    start = calibration.start
    around = (start - _HALF_RANGE, start + _HALF_RANGE)
    low, high = calibration.options.lr_range or around
    trials = calibration.trials()
    diverged = trials.diverged()
    scored = [trial for trial, _ in trials.scored()]
    for count, trial in enumerate(scored, start=1):
        ran = Trials(scored[:count])
        tried = ran.rates()
        below = _below_cliff(ran.at(trial.rank), diverged)
        best = min(below, key=lambda run: run.value).x if below else min(tried)
        if (min(tried) if all_rose(below) else best) < low + _EDGE:
            low -= _WIDEN
        if below and best > high - _EDGE and best >= max(tried):
            high += _WIDEN
    return low, high


def _below_cliff(trials: Trials, diverged: set[int]) -> list[Observation]:
    """Return the runs below every rate that diverged."""
    lost = Trials(trial for trial in trials if trial.number in diverged)
    cliff = min(lost.rates(), default=math.inf)
    return [run for run in trials.observations() if run.x < cliff]


def _beside(proposed: float, taken: Sequence[float], low: float, high: float) -> float:
    """Return `proposed`, or the nearest free rate in strides below or above it, or in half strides.

    If all of them are taken by other workers, return the middle of the widest gap between taken
    rates.
    """
    sides = (-_STRIDE, _STRIDE, -_STRIDE / 2, _STRIDE / 2)
    counts = range(1, len(taken) + 2)
    strides = [0.0, *map(math.prod, product(sides, counts))]
    options = [proposed + stride for stride in strides]
    for x in [x for x in options if low <= x <= high] or [proposed]:
        if _distance(x, taken) > _TAKEN:
            return x
    marks = sorted({low, high, *(x for x in taken if low < x < high)})
    _, middle = max((b - a, (a + b) / 2) for a, b in pairwise(marks))
    return middle


def _distance(x: float, rates: Sequence[float]) -> float:
    return min((abs(x - rate) for rate in rates), default=math.inf)


def next_bracket(
    runs: Sequence[Observation], low: float, high: float, pruned: Sequence[float] = ()
) -> float | None:
    """Return the next rate of the outward search, which some runs have begun.

    None means that the optimum is bracketed: a clearly worse rate was seen above the best, and any
    rate below it. The search continues upwards until the cliff is seen, since the loss is flat
    below it. If three runs show no learning beyond their noise, it continues downwards, to the end
    of the range.
    """
    tried = [run.x for run in runs]
    good = below_cliff(runs)
    below = min(tried) - _STRIDE
    above = max(tried) + _STRIDE
    if not good or (len(runs) >= _UPWARDS and below >= low and none_learned(good)):
        return below
    best = min(good, key=lambda run: run.value)
    if not _has_cliff(best, runs, good, pruned):
        return above if above <= high else None
    lower = best.x - _STRIDE
    is_tried = min((*tried, *pruned)) < best.x - _STRIDE / 4
    return None if is_tried or lower < low else lower


def _has_cliff(
    best: Observation,
    runs: Sequence[Observation],
    good: Sequence[Observation],
    pruned: Sequence[float],
) -> bool:
    """Return whether a run above the best rate diverged, was pruned or scored clearly worse."""
    if len(good) < len(runs):
        return True
    limit = best.value + _CLEARLY * gain_of(good)
    worse = [run.x for run in good if run.value > limit]
    return max((*worse, *pruned), default=-math.inf) > best.x


def between(
    runs: Sequence[Observation], others: Sequence[float]
) -> tuple[float, float]:
    """Return the nearest rates of others below and above a rank's best run."""
    if not runs:
        return -math.inf, math.inf
    best = min(runs, key=lambda run: run.value).x
    lower = max((x for x in others if x < best), default=-math.inf)
    upper = min((x for x in others if x > best), default=math.inf)
    return lower, upper


def _under(ceiling: float | None) -> float:
    """Return the highest rate for refinement."""
    return math.inf if ceiling is None else ceiling - _CLEARANCE


def next_refinement(
    tried: Sequence[float], centre: float, within: tuple[float, float]
) -> float:
    """Return the offset rate, clipped to `within`, that is farthest from the rates tried at the
    rank.
    """
    low, high = within
    centre = max(min(centre, high), low)
    for offsets in _OFFSETS:
        options = [max(min(centre + offset, high), low) for offset in offsets]
        best = max(options, key=lambda x: _distance(x, tried))
        if _distance(best, tried) > _TAKEN:
            break
    return float(best)


def _next_full(trials: Trials, tried: Sequence[float], centre: float) -> float:
    """Return the predicted rate of full finetuning first, then an octave below the best run, then
    above it, then between its neighbours.

    Lower rates come first, since too high costs more. Three runs bracket an optimum predicted
    within an octave.

    Args:
        trials: all of them.
        tried: log2 of all rates tried in full finetuning.
        centre: log2 of the predicted rate.
    """
    lost = trials.diverged()
    scored = trials.at(None).scored()
    good = [run for trial, run in scored if trial.number not in lost]
    if not good:
        return min(tried) - _FULL_STEP if tried else centre
    best = min(good, key=lambda run: run.value).x
    lower, upper = between(good, tried)
    if math.isinf(lower):
        return best - _FULL_STEP
    if math.isinf(upper):
        return best + _FULL_STEP
    return (best + lower) / 2 if best - lower > upper - best else (best + upper) / 2


# --- when a run is stopped ------------------------------------------------------------------------


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
    its noise, since its curve shows no learning. Nothing is pruned before the end of the warm-up,
    nor in the first 30 % of the steps.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        options = calibration.options
        self._first = max(EARLY, options.warmup or 0.0) * options.schedule.steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        if trial.last_step is None or trial.last_step < self._first:
            return False
        record = TrialRecord.read(trial)
        best = self._calibration.trials().best_of(record.setting)
        if best is None or record.x is None:
            return False
        for mark in (best.x, record.estimate):
            if mark is not None and round(abs(record.x - mark), _DIGITS) < _NEAR:
                return False
        return _lags(record, best)


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
