"""Which learning rate to try next, and when to stop a run early.

The search brackets the optimum of one rank first, and then measures around the fitted optimum at
all ranks. It keeps no state: everything is read from the stored trials. So a study that is resumed,
or that several workers share, continues in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from statistics import fmean, stdev

from optuna.trial import TrialState

from ..fitting import (
    CLEAR,
    EARLY,
    TAIL,
    Observation,
    all_rose,
    below_cliff,
    best_fall,
    diverged,
    gain_of,
    none_learned,
    recent_mean,
    usual_noise,
    usual_start,
)
from ._calibration import Calibration
from ._constants import (
    BRACKET,
    CLEARANCE,
    CLEARLY,
    EDGE,
    FULL_STEP,
    HALF_RANGE,
    JUDGED,
    NEAR,
    OFFSETS,
    REPORTS,
    STANDARD_ERRORS,
    STRIDE,
    TAKEN,
    WORSE,
)
from ._trials import Run, Setting, Trials


def next_rate(
    calibration: Calibration, rank: int | None, within: tuple[float, float]
) -> float:
    """Return log2 of the base learning rate to try next at a rank.

    First the search moves outwards from its first learning rate, until it has seen the cliff above
    the best one, and one learning rate below it. It does so at the rank of the first run only,
    because losses of different ranks cannot be compared. Then it refines: of eight offsets from the
    fitted optimum it takes the one that is farthest from all that were tried at the rank. Full
    finetuning after a search goes around its predicted learning rate. What another worker is
    running counts as tried.

    Args:
        calibration: what the trials say so far.
        rank: the rank, None for full finetuning.
        within: log2 of the lowest and the highest learning rate.
    """
    low, high = within
    trials = calibration.trials()
    running = trials.running()
    tried = Trials((*trials.counted(), *running)).at(rank).rates()
    outwards = _outwards(calibration, trials, rank, within)
    if outwards is not None:
        x = _beside(outwards, [*running.rates(), *tried], low, high)
        return float(min(max(x, low), high))
    # the optimum of the first rank is bracketed, so some run did not diverge, and there is a fit
    fit = calibration.fit()
    assert fit is not None
    if rank is None and calibration.options.full_trials:
        x = _next_full(trials.observations(), tried, fit.best(rank))
    else:
        # below the runs that diverged, and between those that were stopped early
        of_rank = trials.at(rank)
        bottom, top = between(of_rank.observations(), of_rank.pruned())
        under = math.inf if fit.ceiling is None else fit.ceiling - CLEARANCE
        free = max(low, bottom), min(high, under, top)
        x = next_refinement(tried, fit.best(rank), free)
    return float(min(max(x, low), high))


def _outwards(
    calibration: Calibration,
    trials: Trials,
    rank: int | None,
    within: tuple[float, float],
) -> float | None:
    """Return log2 of the next learning rate of the outward search, or None if it is not due.

    It is not due once there is a fit, if the optimum of the first run's rank is bracketed, or if
    this is another rank.
    """
    observations = trials.observations()
    if not observations:
        return calibration.start
    of_anchor = trials.at(observations[0].rank)
    outwards = next_bracket(of_anchor.observations(), *within, of_anchor.pruned())
    # every run diverged so far, at whatever rank: go further down
    if calibration.fit() is None:
        lowest = min(run.x for run in observations)
        return lowest - STRIDE if outwards is None else outwards
    return outwards if rank == observations[0].rank else None


def search_range(calibration: Calibration) -> tuple[float, float]:
    """Return log2 of the lowest and the highest learning rate to try.

    The range is `lr_range`, or eight octaves around the first guess. It is widened whenever the
    best learning rate so far is at an edge. The best one is searched at each rank, below the runs
    that diverged there. If all runs rose, the lowest learning rate counts as the best.
    """
    start = calibration.start
    around = (start - HALF_RANGE, start + HALF_RANGE)
    low, high = calibration.options.octaves or around
    observations = calibration.trials().observations()
    # Trial by trial, as if each had just ended: whether an edge moved depends on what was best
    # then.
    lost = diverged(observations)
    for count in range(1, len(observations) + 1):
        low, high = _widened(low, high, observations[:count], lost)
    return max(low, calibration.options.floor), high


def _widened(
    low: float,
    high: float,
    ran: Sequence[Observation],
    lost: Collection[Observation],
) -> tuple[float, float]:
    """Return the range, widened if the last of these runs requires it.

    Args:
        low: log2 of the lowest learning rate before that run.
        high: log2 of the highest one.
        ran: the runs so far.
        lost: the runs that diverged, of the whole study.
    """
    tried = [run.x for run in ran]
    below = below_cliff([run for run in ran if run.rank == ran[-1].rank], lost)
    best = min(below, key=lambda run: run.value).x if below else -math.inf
    if (min(tried) if all_rose(below) else best) < low + EDGE:
        low -= STRIDE
    if best > high - EDGE and best >= max(tried):
        high += STRIDE
    return low, high


def _beside(
    proposed: float,
    taken: Sequence[float],
    low: float,
    high: float,
) -> float:
    """Return `proposed`, or the middle of the widest gap between the taken learning rates if it is
    one of them.
    """
    if _distance(proposed, taken) > TAKEN:
        return proposed
    marks = sorted({low, high, *(x for x in taken if low < x < high)})
    a, b = max(pairwise(marks), key=lambda gap: gap[1] - gap[0])
    return (a + b) / 2


def _distance(x: float, rates: Sequence[float]) -> float:
    return min((abs(x - rate) for rate in rates), default=math.inf)


def next_bracket(
    runs: Sequence[Observation], low: float, high: float, pruned: Sequence[float] = ()
) -> float | None:
    """Return log2 of the next learning rate of the outward search, or None if it has ended.

    It has ended when the optimum is bracketed: a clearly worse learning rate was seen above the
    best one, and any other below it. The search goes upwards first, until it sees the cliff,
    because the loss is flat below the cliff. If three runs learned nothing beyond their noise, it
    goes downwards, to the end of the range.

    Args:
        runs: the runs so far, at least one.
        low: log2 of the lowest learning rate of the range.
        high: log2 of the highest one.
        pruned: log2 of the learning rates of runs that were stopped early.
    """
    tried = [run.x for run in runs]
    good = below_cliff(runs, diverged(runs))
    below = min(tried) - STRIDE
    above = max(tried) + STRIDE
    if not good or (len(runs) >= BRACKET and below >= low and none_learned(good)):
        return below
    best = min(good, key=lambda run: run.value)
    if not _has_cliff(best, runs, good, pruned):
        return above if above <= high else None
    lower = best.x - STRIDE
    is_tried = min((*tried, *pruned)) < best.x - STRIDE / 4
    return None if is_tried or lower < low else lower


def _has_cliff(
    best: Observation,
    runs: Sequence[Observation],
    good: Sequence[Observation],
    pruned: Sequence[float],
) -> bool:
    """Return whether a run above the best learning rate diverged, was stopped early, or has a
    clearly worse score.
    """
    if len(good) < len(runs):
        return True
    limit = best.value + CLEARLY * gain_of(good)
    worse = [run.x for run in good if run.value > limit]
    return max((*worse, *pruned), default=-math.inf) > best.x


def between(
    runs: Sequence[Observation], others: Sequence[float]
) -> tuple[float, float]:
    """Return which of the other learning rates are next to a rank's best run, below and above."""
    if not runs:
        return -math.inf, math.inf
    best = min(runs, key=lambda run: run.value).x
    lower = max((x for x in others if x < best), default=-math.inf)
    upper = min((x for x in others if x > best), default=math.inf)
    return lower, upper


def next_refinement(
    tried: Sequence[float], centre: float, within: tuple[float, float]
) -> float:
    """Return the offset from the centre, clipped to `within`, that is farthest from all tried.

    Args:
        tried: log2 of the learning rates tried at the rank.
        centre: log2 of the fitted optimum.
        within: log2 of the lowest and the highest learning rate.
    """
    low, high = within
    centre = max(min(centre, high), low)
    for offsets in OFFSETS:
        options = [max(min(centre + offset, high), low) for offset in offsets]
        best = max(options, key=lambda x: _distance(x, tried))
        if _distance(best, tried) > TAKEN:
            break
    return float(best)


def _next_full(
    observations: Sequence[Observation],
    tried: Sequence[float],
    centre: float,
) -> float:
    """Return log2 of the next learning rate of full finetuning.

    It is the predicted one first, then an octave below the best run, then an octave above it, then
    between its neighbours. Lower ones come first, because too high a learning rate costs more than
    too low. Three runs bracket an optimum that was predicted to within an octave.

    Args:
        observations: the observations of all trials.
        tried: log2 of all learning rates tried in full finetuning.
        centre: log2 of the predicted learning rate.
    """
    lost = diverged(observations)
    good = [run for run in observations if run.rank is None and run not in lost]
    if not good:
        return min(tried) - FULL_STEP if tried else centre
    best = min(good, key=lambda run: run.value).x
    lower, upper = between(good, tried)
    if math.isinf(lower):
        return best - FULL_STEP
    if math.isinf(upper):
        return best + FULL_STEP
    return (best + lower) / 2 if best - lower > upper - best else (best + upper) / 2


# --- when a run is stopped ------------------------------------------------------------------------


def divergence_limits(
    trials: Trials,
    setting: Setting,
    steps: int,
) -> list[float]:
    """Return, for each step, the mean of recent values above which a run counts as diverged.

    The limit is the usual start of the runs plus a margin: half the best gain, or what the noise of
    the curves explains. A batch may be hard for every model. So the limit is also at least that
    margin above the loss of a run that learns nothing, which on the same batches is at most one
    gain above the best run. The usual start is a median over runs, because a single first value may
    be low by chance.

    Args:
        trials: the trials that count.
        setting: rank and seed of the run.
        steps: the steps of a whole run.
    """
    observations = trials.observations()
    gain = best_fall(observations) or math.inf
    margin = max(gain / 2, CLEAR * usual_noise(observations))
    flat = usual_start(observations) + margin

    # The run to compare with: of the same rank and seed if there is one, else of the same seed, and
    # of those the best. Runs of one seed see the same batches.
    def distance(run: Run) -> tuple[bool, bool, float]:
        return run.setting != setting, run.seed != setting.seed, run.value

    whole = [run for run in trials if run.state == TrialState.COMPLETE]
    if not whole:
        return [flat] * steps
    curve = min(whole, key=distance).curve
    windows = (curve[max(0, end - TAIL) : end] for end in range(1, steps + 1))
    return [max(flat, fmean(window) + gain + margin) for window in windows]


def interval(steps: int) -> int:
    """Return the number of steps between two reports of a run."""
    return max(1, steps // REPORTS)


def is_behind(calibration: Calibration, run: Run) -> bool:
    """Return whether to stop a run early, because it lags behind the best run of its rank and seed.

    At its last reports it must be worse than the best run was at the same step, by more than half
    of what the best run had gained by then. Differences that noise explains do not count, nor does
    a best run that gained no more than its noise. A run is never stopped if its learning rate is
    within an octave of the best run's or of the estimated optimum, nor before the end of the
    warm-up, nor in the first 30 % of its steps.
    """
    options = calibration.options
    best = calibration.trials().best_of(run.setting)
    if best is None or best.observation is None:
        return False
    if len(run.curve) < max(EARLY, best.warmup) * options.steps:
        return False
    fit = calibration.fit()
    marks = [best.observation.x]
    if fit is not None:
        marks.append(fit.best(run.rank))
    # trials often lie whole octaves apart, so rounding must not decide
    if any(round(abs((run.x or 0.0) - mark), 6) < NEAR for mark in marks):
        return False
    return _lags(run.curve, best.curve, best.observation, interval(options.steps))


def _lags(
    curve: Sequence[float],
    beside: Sequence[float],
    best: Observation,
    every: int,
) -> bool:
    """Return whether a curve lags behind a better one: in each of the last reports by more than the
    margin, and in their mean by more than the noise.

    Args:
        curve: the values of the run so far.
        beside: the values of the best run.
        best: the best run.
        every: the number of steps between two reports.
    """
    window = max(TAIL, every)
    gaps = []
    for step in range(len(curve), 0, -every)[:JUDGED]:
        mine, theirs = (recent_mean(each[:step], window) for each in (curve, beside))
        gain = best.start - theirs
        if gain <= CLEAR * best.noise or mine - theirs <= WORSE * gain:
            return False
        gaps.append(mine - theirs)
    if len(gaps) < 2:
        return False
    return fmean(gaps) > STANDARD_ERRORS * stdev(gaps) / math.sqrt(len(gaps))
