"""This module chooses the learning rate of the next trial and decides when to stop a
trial early.

The search first brackets the best learning rate of one LoRA rank: it tries learning
rates until one is clearly too high and one is below the best. Then the search tries
learning rates near the estimated best learning rate of every LoRA rank. All decisions
of the search depend only on the stored trials. The search therefore makes the same
decisions if a calibration is resumed or shared by several workers.
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
    """Return log2 of the base learning rate that the next trial at a LoRA rank should
    use.

    The search has two phases. In the first phase, the search moves outwards from its
    first learning rate, until it has tried a learning rate that is clearly too high and
    a learning rate below the best one. The first phase only uses the LoRA rank of the
    first trial, because losses at different ranks cannot be compared.

    In the second phase, the search refines its estimate of the best learning rate. The
    search considers eight learning rates around this estimate, and chooses the one that
    is farthest from all learning rates tried at the same LoRA rank. If full finetuning
    is tried after the LoRA ranks, its trials use learning rates around the predicted
    best learning rate of full finetuning. Learning rates of other workers' unfinished
    trials count as tried.

    Args:
        calibration: the calibration and its trials so far.
        rank: the LoRA rank, or None for full finetuning.
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
    # `_outwards` returns None only if some run did not diverge, so a fit exists
    fit = calibration.fit()
    assert fit is not None
    if rank is None and calibration.options.full_trials:
        x = _next_full(trials.observations(), tried, fit.best(rank))
    else:
        # Stay below the runs that diverged, and between the nearest runs that were stopped
        # early on either side of the best run.
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
    """Return log2 of the next learning rate that the search tries in order to bracket
    the best learning rate.

    Return None if the best learning rate need not be bracketed at this LoRA rank. The
    best learning rate is only bracketed at the LoRA rank of the first trial. As long as
    every trial has diverged, however, the search also tries lower learning rates at
    other LoRA ranks.
    """
    observations = trials.observations()
    if not observations:
        return calibration.start
    of_anchor = trials.at(observations[0].rank)
    outwards = next_bracket(of_anchor.observations(), *within, of_anchor.pruned())
    # Every run has diverged so far, whatever its rank: try lower learning rates.
    if calibration.fit() is None:
        lowest = min(run.x for run in observations)
        return lowest - STRIDE if outwards is None else outwards
    return outwards if rank == observations[0].rank else None


def search_range(calibration: Calibration) -> tuple[float, float]:
    """Return log2 of the lowest and the highest learning rate that the search may try.

    By default, this range covers eight octaves (factors of two) around the learning
    rate of the first trial, but the user can pass `lr_range` instead. The range of
    learning rates is widened whenever the best learning rate so far is near one end of
    it. When the best learning rate is determined, trials that diverged are ignored, and
    so are trials of the same rank with even higher learning rates. If the loss rose in
    every trial, the lowest learning rate counts as the best.
    """
    start = calibration.start
    around = (start - HALF_RANGE, start + HALF_RANGE)
    low, high = calibration.options.octaves or around
    observations = calibration.trials().observations()
    # Replay the trials in order: whether an edge moved depends on which learning rate was the
    # best at that time. Nothing is stored, so the replay must give the same range every time.
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
    """Widen the range of learning rates if the best learning rate so far is near an end
    of this range, and return the range.

    Args:
        low: log2 of the lowest learning rate before the last run.
        high: log2 of the highest learning rate before the last run.
        ran: the runs so far.
        lost: the runs of the whole study that diverged.
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
    """Return the learning rate `proposed`, unless it is too close to a learning rate
    that was already tried.

    If the learning rate `proposed` is too close, return the middle of the widest gap
    between the learning rates in `taken`.
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
    """Return log2 of the next learning rate to try, or None if the best learning rate
    is bracketed.

    The best learning rate is bracketed if a higher learning rate was clearly worse and
    some lower learning rate was tried. The search tries higher learning rates first.
    Below the best learning rate, the loss changes slowly. Above it, there is usually a
    learning rate from which the loss rises steeply. If at least three trials have run
    and none of them reduced its loss by more than the noise, the search moves down to
    the lower end of the range.

    Args:
        runs: the runs so far, at least one.
        low: log2 of the lowest learning rate of the range.
        high: log2 of the highest learning rate of the range.
        pruned: log2 of the learning rates of runs that were stopped early.
    """
    # The conditions are ordered: first leave the region where nothing works, then look for a
    # learning rate that is too high, and then for one below the best.
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
    # a run less than a quarter of a stride below the best is too close to bracket it
    is_tried = min((*tried, *pruned)) < best.x - STRIDE / 4
    return None if is_tried or lower < low else lower


def _has_cliff(
    best: Observation,
    runs: Sequence[Observation],
    good: Sequence[Observation],
    pruned: Sequence[float],
) -> bool:
    """Return whether some learning rate above the best learning rate is clearly too
    high.

    A learning rate is clearly too high if its trial diverged, was stopped early, or has
    a clearly worse score than the best trial.
    """
    # `good` leaves out the runs that diverged and every run above them
    if len(good) < len(runs):
        return True
    limit = best.value + CLEARLY * gain_of(good)
    worse = [run.x for run in good if run.value > limit]
    return max((*worse, *pruned), default=-math.inf) > best.x


def between(
    runs: Sequence[Observation], others: Sequence[float]
) -> tuple[float, float]:
    """Return the two learning rates in `others` that are nearest to the best trial's
    learning rate, one below it and one above it.
    """
    if not runs:
        return -math.inf, math.inf
    best = min(runs, key=lambda run: run.value).x
    lower = max((x for x in others if x < best), default=-math.inf)
    upper = min((x for x in others if x > best), default=math.inf)
    return lower, upper


def next_refinement(
    tried: Sequence[float], centre: float, within: tuple[float, float]
) -> float:
    """Of several learning rates near the estimated best one, return the learning rate
    that is farthest from all learning rates tried so far.

    These learning rates have fixed distances on a log scale from the estimated best
    learning rate, and are clipped to the range `within`.

    Args:
        tried: log2 of the learning rates that were tried at this rank.
        centre: log2 of the fitted optimum.
        within: log2 of the lowest and the highest learning rate.
    """
    low, high = within
    centre = max(min(centre, high), low)
    # The second group of offsets is used only if every offset of the first group is too close
    # to a learning rate that was tried.
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
    """Return log2 of the learning rate of the next trial of full finetuning.

    The first trial of full finetuning uses the learning rate that is predicted to be
    best. The second trial uses half the best learning rate so far, and the third trial
    uses twice the best learning rate so far. Later trials use learning rates between
    the best learning rate and its neighbours. The search tries the lower learning rate
    first, because a learning rate that is too high increases the loss more than one
    that is too low. If the predicted learning rate is correct to within a factor of
    two, three trials bracket the best learning rate.

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
    # an infinite neighbour means that this side of the best run has not been tried
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
    """Return, for each training step, the loss above which a trial counts as diverged.

    A trial counts as diverged if the mean of its recent losses is above a limit. The
    limit for divergence is the usual loss at the start of a trial plus a margin. This
    margin is half the largest reduction of the loss in any trial, but at least a
    multiple of the noise of the loss curves. The usual loss at the start is a median
    over all trials, because the first loss of a single trial may be low by chance.

    At training steps whose batches have a high loss in every trial, the limit for
    divergence is higher. A trial that learns nothing has a higher loss than the best
    trial on the same batches. The difference should be at most the largest reduction of
    the loss in any trial. The limit for divergence is therefore at least the sum of the
    best trial's loss, this largest reduction and the margin.

    Args:
        trials: the trials that count.
        setting: the rank and seed of the run.
        steps: the number of steps of a whole run.
    """
    observations = trials.observations()
    gain = best_fall(observations) or math.inf
    margin = max(gain / 2, CLEAR * usual_noise(observations))
    flat = usual_start(observations) + margin

    # Compare with a run of the same rank and seed if possible, or else with a run of the same
    # seed, because runs with the same seed see the same batches. Prefer the best of them.
    def distance(run: Run) -> tuple[bool, bool, float]:
        return run.setting != setting, run.seed != setting.seed, run.value

    whole = [run for run in trials if run.state == TrialState.COMPLETE]
    if not whole:
        return [flat] * steps
    curve = min(whole, key=distance).curve
    windows = (curve[max(0, end - TAIL) : end] for end in range(1, steps + 1))
    return [max(flat, fmean(window) + gain + margin) for window in windows]


def interval(steps: int) -> int:
    """Return the number of training steps between two reports of a trial's mean
    loss.
    """
    return max(1, steps // REPORTS)


def is_behind(calibration: Calibration, run: Run) -> bool:
    """Return whether to stop a trial early because its loss is far above the loss of
    the best trial with the same rank and seed.

    At each of its last reports, the trial's loss must be higher than the best trial's
    loss at the same step. The difference must be more than half of the best trial's
    reduction of the loss until then. The mean difference between the two loss curves
    must also exceed their noise. If the best trial has reduced its loss by no more than
    the noise of this loss, no trial is stopped.

    A trial is never stopped if its learning rate is within a factor of two of the best
    trial's or of the estimated best learning rate. Trials are also never stopped during
    the warm-up or in the first 30 % of their steps.
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
    # Trials are often exactly one octave apart. Without rounding, the last digit of a float
    # would decide whether such a run is near the mark.
    if any(round(abs((run.x or 0.0) - mark), 6) < NEAR for mark in marks):
        return False
    return _lags(run.curve, best.curve, best.observation, interval(options.steps))


def _lags(
    curve: Sequence[float],
    beside: Sequence[float],
    best: Observation,
    every: int,
) -> bool:
    """Return whether a trial's loss curve is clearly higher than the loss curve of the
    best trial.

    At each of the trial's last reports, its loss must exceed the best trial's loss by a
    minimum margin. The mean difference between the two loss curves must also exceed the
    noise of this difference.

    Args:
        curve: the values of the run so far.
        beside: the values of the best run.
        best: the best run.
        every: the number of steps between two reports.
    """
    # both curves are smoothed, and compared at the same steps: they saw the same batches
    window = max(TAIL, every)
    gaps = []
    for step in range(len(curve), 0, -every)[:JUDGED]:
        mine, theirs = (recent_mean(each[:step], window) for each in (curve, beside))
        gain = best.start - theirs
        if gain <= CLEAR * best.noise or mine - theirs <= WORSE * gain:
            return False
        gaps.append(mine - theirs)
    if len(gaps) < 2:  # a standard error needs two
        return False
    return fmean(gaps) > STANDARD_ERRORS * stdev(gaps) / math.sqrt(len(gaps))
