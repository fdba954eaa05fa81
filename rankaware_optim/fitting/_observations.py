"""This module prepares the trials for the fit.

Some of its functions measure the beginning, the end and the noise of loss curves. Other functions
find runs that diverged or did not learn, and convert scores to the units of the loss model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ._constants import CLEAR, DIVERGED, EARLY, ROSE, TAIL, UNTRAINED_GAP
from ._loss_model import Arm

# The median absolute second difference of independent normal noise with standard deviation 1. A
# second difference a − 2b + c has the standard deviation √(1 + 4 + 1), and half of all values of a
# standard normal distribution are between −0.6745 and 0.6745.
_BEND = 0.6745 * math.sqrt(6.0)

Curve = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """A scored trial in the form that the fit needs.

    Args:
        rank: the LoRA rank, or None for full finetuning.
        seed: the trial's random seed.
        x: log2 of the base learning rate.
        value: the score, which is minimised, or infinity if the trial diverged.
        start: the loss at the beginning of the curve, see `loss_at_start`.
        tail: the mean of the last tenth of the curve.
        returned: whether the training function returned the score. If not, the score is `tail`.
        first: the first value of the curve, or infinity if unknown.
        noise: standard deviation of a single value of the curve, see `noise_of`.
    """

    rank: int | None
    seed: int
    x: float
    value: float
    start: float
    tail: float
    returned: bool = False
    first: float = math.inf
    noise: float = 0.0


def loss_at_start(curve: Curve) -> float:
    """Return the loss at the beginning of a curve.

    Because a single loss may be low by chance, the result is the larger of the first loss and the
    median of the first five losses.
    """
    return float(max(curve[0], statistics.median(curve[:TAIL])))


def recent_mean(curve: Curve, count: int | None = None) -> float:
    """Return the mean of the last `count` values of a curve.

    By default, `count` is a tenth of the length of the curve, but at least 5.
    """
    last = curve[-(count or max(TAIL, len(curve) // 10)) :]
    return float(sum(last) / len(last))


def noise_of(curve: Curve) -> float:
    """Estimate the noise of a loss curve, which is how much its values scatter around the trend.

    The loss is noisy because each step uses a different batch. To remove the trend, the function
    computes second differences of the curve. The noise is the scaled median of the absolute second
    differences, which single jumps do not affect. The estimated noise is a standard deviation, or 0
    for a loss curve with fewer than three values.
    """
    values = np.asarray(curve, dtype=np.float64)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore", invalid="ignore"):
        bends = np.abs(values[:-2] - 2 * values[1:-1] + values[2:])
    if not len(bends):
        return 0.0
    return float(np.median(bends)) / _BEND


def turn_of(curve: Curve) -> int:
    """Return -1 if a loss curve fell, 1 if it rose, and 0 if the change may be noise.

    The function compares the mean of the last values of the curve with the mean of the first
    values.
    """
    # ROSE is in units of the noise of a single value, as explained in `_constants`.
    change = recent_mean(curve) - recent_mean(curve[:TAIL])
    doubt = ROSE * noise_of(curve)
    return int(change > doubt) - int(-change > doubt)


def impute(
    x: float, curve: Curve, best: Observation, beside: Curve
) -> Observation | None:
    """Estimate the final score of a run that was stopped early.

    The function compares the run with the best run of the same rank and seed. It assumes that the
    difference between the losses of the two runs would have stayed the same until the end. Without
    an estimate of its final score, the fit would ignore the run, although the run shows how bad its
    learning rate is.

    Args:
        x: log2 of the stopped run's base learning rate.
        curve: the losses of the stopped run.
        best: the best run of the same rank and seed.
        beside: the losses of the best run.

    Returns:
        The run with its estimated score, or None if the run was stopped in the first 30 % of its
        steps.
    """
    if len(curve) < max(1.0, EARLY * len(beside)):
        return None
    # Compare both runs at the step at which this run was stopped. The gap is at least 0, so that a
    # run that was stopped never counts as better than the best run.
    gap = max(0.0, recent_mean(curve, TAIL) - recent_mean(beside[: len(curve)], TAIL))
    return replace(
        best,
        x=x,
        value=best.value + gap,
        start=loss_at_start(curve),
        tail=best.tail + gap,
    )


def arms_of(
    observations: Sequence[Observation], lost: Collection[Observation], gain: float
) -> dict[int | None, Arm]:
    """Group trials by rank, and convert their scores to the units of the loss model.

    Args:
        observations: the trials.
        lost: the trials that diverged. They get the score of an untrained model.
        gain: how far training improved the loss, see `gain_of`.
    """
    arms = {}
    for rank in dict.fromkeys(o.rank for o in observations):
        of_rank = [o for o in observations if o.rank == rank]
        values = np.array([math.inf if o in lost else o.value for o in of_rank])
        # If all trials of a rank diverged, inf − inf is NaN, which fmin replaces by the untrained
        # gap (unlike np.minimum, which would return NaN).
        gaps = np.fmin((values - values.min()) / gain, UNTRAINED_GAP)
        x = np.array([o.x for o in of_rank])
        seeds = np.array([o.seed for o in of_rank])
        arms[rank] = Arm(x, gaps, seeds)
    return arms


def gain_of(good: Sequence[Observation]) -> float:
    """Return the gain, which is the unit of losses in the loss model.

    The gain is the difference between the usual loss at the beginning and the final
    loss of the best run. Scores that the user's code returned may not be comparable with
    the losses, for example if a score is an accuracy. The scores count as not comparable
    if their median distance to the final losses is more than half of the best run's
    improvement. If the scores are not comparable, the gain is the distance from the best
    score to the upper quartile of the scores.

    good: the trials that did not diverge.
    """
    scores = np.array([o.value for o in good])
    best = float(scores.min())
    fall = best_fall(good)
    distance = float(np.median([abs(o.value - o.tail) for o in good]))
    if fall <= 0 or distance > fall / 2:
        fall = float(np.quantile(scores, 0.75)) - best
    # The gain must not be zero, because scores are divided by it. It would be zero if all scores
    # are equal.
    return max(fall, 1e-6 * (1.0 + abs(best)))


def best_fall(observations: Sequence[Observation]) -> float:
    """Return by how much the best run reduced the loss, or 0 if the loss did not fall in any run.

    All runs start from the same model, but the first losses of a single run may be low by chance.
    The function therefore uses the median of the losses at the beginning of all runs.
    """
    ends = [o.tail for o in observations if math.isfinite(o.tail) and o.tail < o.start]
    return max(0.0, usual_start(observations) - min(ends, default=math.inf))


def usual_start(observations: Sequence[Observation]) -> float:
    """Return the median loss at the beginning of the runs, or 0 for an empty list of runs."""
    return _median(o.start for o in observations)


def usual_noise(observations: Sequence[Observation]) -> float:
    """Return the median noise of the loss curves, or 0 for an empty list of runs."""
    return _median(o.noise for o in observations)


def _median(values: Iterable[float]) -> float:
    return float(np.median([*values] or [0.0]))


# --- which runs diverged, and which learned -------------------------------------------------------


def diverged(observations: Sequence[Observation]) -> set[Observation]:
    """Return the runs that diverged.

    A run counts as diverged if its score or its final loss is not finite. A run also
    counts as diverged if its loss increased by more than the noise and by more than a
    quarter of the best run's improvement. If no run improved, a run counts as diverged
    if its loss increased by more than the noise, unless the user's code returned the
    scores. Scores from the user's code may not be comparable with the training losses.
    """
    start = usual_start(observations)
    gain = best_fall(observations)
    margin = max(DIVERGED * gain, CLEAR * usual_noise(observations))

    def is_lost(o: Observation) -> bool:
        if not math.isfinite(o.value + o.tail):
            return True
        comparable = gain > 0 or not o.returned
        return comparable and o.tail > max(o.start, start) + margin

    return set(filter(is_lost, observations))


def below_cliff(
    observations: Sequence[Observation], lost: Collection[Observation]
) -> list[Observation]:
    """Return the runs whose learning rates are below the lowest learning rate that diverged.

    If a run did not diverge although its learning rate was above the lowest one that diverged, the
    run was probably lucky.
    """
    # Without a run that diverged, the limit is infinite and all runs are returned.
    cliff = min((o.x for o in observations if o in lost), default=math.inf)
    return [o for o in observations if o.x < cliff]


def end_of(observations: Sequence[Observation], rank: int | None) -> str:
    """Return "lowest" or "highest" if a rank's best learning rate is the lowest or highest one
    tried.

    Return an empty string if the best learning rate is between two others, or if two learning rates
    are equally good. The function compares the mean scores over all seeds. The lowest score of a
    single run is often just luck, especially if the loss hardly depends on the learning rate.
    """
    scores: dict[float, list[float]] = {}
    for o in observations:
        if o.rank == rank:
            scores.setdefault(o.x, []).append(o.value)
    # A run that diverged has an infinite score, so a single one rules out its learning rate.
    means = {x: sum(values) / len(values) for x, values in scores.items()}
    least = min(means.values(), default=math.inf)
    best = [x for x, mean in means.items() if mean == least]
    if len(means) < 2 or len(best) > 1 or not math.isfinite(least):
        return ""
    return {min(means): "lowest", max(means): "highest"}.get(best[0], "")


def end_note(observations: Sequence[Observation], rank: int | None) -> str:
    """Return a note if the best learning rate of a rank is the lowest or the highest one tried.

    Return an empty string if the best learning rate is between two others.
    """
    end = end_of(observations, rank)
    if not end:
        return ""
    words = "full finetuning" if rank is None else f"rank {rank}"
    return (
        f"{words}: the best learning rate is the {end} one that was tried, so a"
        f" {'lower' if end == 'lowest' else 'higher'} learning rate may be even better"
    )


def all_rose(observations: Iterable[Observation]) -> bool:
    """Return whether the final loss of every run is clearly above its first loss.

    If the loss increased in every run, all learning rates that were tried may be too high.
    """
    return all(o.tail > o.first + ROSE * o.noise for o in observations)


def none_learned(observations: Sequence[Observation]) -> bool:
    """Return whether no run has learned anything, apart from changes that may be noise.

    A run counts as having learned if its final loss is clearly below its first loss. A run whose
    loss did not increase also counts as having learned if its final loss is clearly below the final
    loss of another run.
    """
    noise = usual_noise(observations)
    rise = ROSE * noise
    highest = max((o.tail for o in observations), default=0.0) - CLEAR * noise

    def learned(o: Observation) -> bool:
        return o.tail < o.first - rise or o.tail < min(o.first + rise, highest)

    return not any(learned(o) for o in observations)
