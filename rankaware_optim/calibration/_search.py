"""How a calibration searches: it brackets the optimum of one rank, and then measures around it at
all ranks. When it stops a run.
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
    """Return log2 of the rate to try next at a rank.

    The search moves outwards from the first rate until it has seen the cliff above and a rate below
    the best, at the rank of the first run, since losses of different ranks cannot be compared. Then
    it refines: it takes that of eight offsets from the fitted optimum which is farthest from the
    rates tried at the rank. Full finetuning after a search goes around its predicted rate. A rate
    that another worker is running counts as tried. All state is read from the trials, so that a
    resumed study continues in the same way.

    within: log2 of the lowest and the highest rate.
    """
    low, high = within
    trials = calibration.trials()
    running = trials.running()
    tried = Trials((*trials.counted(), *running)).at(rank).rates()
    outwards = _outwards(calibration, trials, rank, within)
    if outwards is not None:
        x = _beside(outwards, [*running.rates(), *tried], low, high)
        return float(min(max(x, low), high))
    fit = calibration.fit()
    assert fit is not None
    if rank is None and calibration.options.full_trials:
        x = _next_full(trials.observations(), tried, fit.best(rank))
    else:
        # below what diverged, between what was pruned
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
    """Return where the search outwards goes next. None where there is a fit, and the optimum of the
    first run's rank is bracketed or this is another rank.
    """
    observations = trials.observations()
    if not observations:
        return calibration.start
    of_anchor = trials.at(observations[0].rank)
    outwards = next_bracket(of_anchor.observations(), *within, of_anchor.pruned())
    if calibration.fit() is None:
        lowest = min(run.x for run in observations)
        return lowest - STRIDE if outwards is None else outwards
    return outwards if rank == observations[0].rank else None


def search_range(calibration: Calibration) -> tuple[float, float]:
    """Return the range of log2 rates: as given or around the first guess, widened while a best rate
    is at an edge.

    It is computed from the trials each time, so that a resumed study has the same one. Best rates
    are those of each rank, below the rates that diverged there. Where all runs rose, the lowest
    rate counts as the best.
    """
    start = calibration.start
    around = (start - HALF_RANGE, start + HALF_RANGE)
    low, high = calibration.options.octaves or around
    observations = calibration.trials().observations()
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
    """Return the range after the last one of the runs so far, of which some diverged."""
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
    """Return `proposed`, or the middle of the widest gap between taken rates if another worker has
    it.
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
    """Return the next rate of the outward search, which some runs have begun.

    None means that the optimum is bracketed: a clearly worse rate was seen above the best, and any
    rate below it. The search continues upwards until the cliff is seen, since the loss is flat
    below it. If three runs show no learning beyond their noise, it continues downwards, to the end
    of the range.
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
    """Return whether a run above the best rate diverged, was pruned or scored clearly worse."""
    if len(good) < len(runs):
        return True
    limit = best.value + CLEARLY * gain_of(good)
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


def next_refinement(
    tried: Sequence[float], centre: float, within: tuple[float, float]
) -> float:
    """Return the offset rate, clipped to `within`, that is farthest from the rates tried at the
    rank.
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
    """Return the predicted rate of full finetuning first, then an octave below the best run, then
    above it, then between its neighbours.

    Lower rates come first, since too high costs more. Three runs bracket an optimum predicted
    within an octave.

    Args:
        observations: of all trials.
        tried: log2 of all rates tried in full finetuning.
        centre: log2 of the predicted rate.
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
    flat = usual_start(observations) + margin

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
    """Return whether to stop a run: at its last reports it lags the best run of its rank and seed
    by half of the gain of that run at the same step.

    Runs whose rate is within an octave of the best run's or of the estimated optimum are never
    stopped. Differences that noise explains are ignored. So is a best run that gained no more than
    its noise, since its curve shows no learning. Nothing is stopped before the end of the warm-up,
    nor in the first 30 % of the steps.
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
    # rates lie whole octaves apart, up to rounding
    if any(round(abs((run.x or 0.0) - mark), 6) < NEAR for mark in marks):
        return False
    return _lags(run.curve, best.curve, best.observation, interval(options.steps))


def _lags(
    curve: Sequence[float],
    beside: Sequence[float],
    best: Observation,
    every: int,
) -> bool:
    """Return whether each of the last reports lags the best run's by more than the margin, and
    their mean by more than the noise.
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
