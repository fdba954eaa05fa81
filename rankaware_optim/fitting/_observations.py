"""From trials to the input of the loss model: start, end and noise of loss curves, the runs that
diverged or learned nothing, and the gaps of each rank in units of the gain.
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

# The median absolute second difference of white noise of standard deviation 1. Second differences
# have the standard deviation √(1 + 4 + 1), and half of all normal values lie within 0.6745 of 0.
_BEND = 0.6745 * math.sqrt(6.0)

Curve = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """One finished trial.

    Args:
        rank: the LoRA rank, None for full finetuning.
        seed: the trial's random seed.
        x: log2 of the base learning rate.
        value: the score, which is minimised; infinite if the trial diverged.
        start: where the loss curve began, see `loss_at_start`.
        tail: the mean of the last tenth of the curve.
        returned: whether the training function returned the score. If not, the score is `tail`.
        first: the first value of the curve, infinite if it is unknown.
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
    """Return where a loss curve begins: its first value, or the median of the first few values if
    that is higher. A single first value may be low by chance.
    """
    return float(max(curve[0], statistics.median(curve[:TAIL])))


def recent_mean(curve: Curve, count: int | None = None) -> float:
    """Return the mean of the last `count` values, by default a tenth of the curve and at least 5
    values.
    """
    last = curve[-(count or max(TAIL, len(curve) // 10)) :]
    return float(sum(last) / len(last))


def noise_of(curve: Curve) -> float:
    """Return the standard deviation of a single value of a curve about its trend, which comes from
    the differences between batches. It is 0 for a curve of fewer than three values.

    Second differences remove the trend. Their median absolute value ignores single jumps.
    """
    values = np.asarray(curve, dtype=np.float64)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore", invalid="ignore"):
        bends = np.abs(values[:-2] - 2 * values[1:-1] + values[2:])
    if not len(bends):
        return 0.0
    return float(np.median(bends)) / _BEND


def turn_of(curve: Curve) -> int:
    """Return -1 if a curve fell from its first values to its last ones, 1 if it rose, and 0 if its
    noise explains the change.
    """
    change = recent_mean(curve) - recent_mean(curve[:TAIL])
    doubt = ROSE * noise_of(curve)
    return int(change > doubt) - int(-change > doubt)


def impute(
    x: float, curve: Curve, best: Observation, beside: Curve
) -> Observation | None:
    """Estimate the final score of a run that was stopped early, from the best run of the same rank
    and seed.

    The gap between the two when the run was stopped is taken as their gap at the end. Without this
    estimate the fit would not see that a learning rate that is too high was tried.

    Args:
        x: log2 of the stopped run's base learning rate.
        curve: its losses until it was stopped.
        best: the best run of the same rank and seed.
        beside: the losses of that run.

    Returns:
        The run with its estimated score, or None if it was stopped in the first 30 % of its steps.
    """
    if len(curve) < max(1.0, EARLY * len(beside)):
        return None
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
    """Return the trials of every rank in the units of the loss model.

    Args:
        observations: the trials.
        lost: the trials that diverged. They count as untrained, so their gap is `UNTRAINED_GAP`.
        gain: how far training improved the loss, see `gain_of`.
    """
    arms = {}
    for rank in dict.fromkeys(o.rank for o in observations):
        of_rank = [o for o in observations if o.rank == rank]
        values = np.array([math.inf if o in lost else o.value for o in of_rank])
        # If all trials of a rank diverged, inf − inf is NaN, which fmin replaces.
        gaps = np.fmin((values - values.min()) / gain, UNTRAINED_GAP)
        x = np.array([o.x for o in of_rank])
        seeds = np.array([o.seed for o in of_rank])
        arms[rank] = Arm(x, gaps, seeds)
    return arms


def gain_of(good: Sequence[Observation]) -> float:
    """Return the gain, the unit of the loss model: how far the best curve fell from the usual
    start.

    Scores that the user's code returned may not be comparable with the curves, such as an accuracy
    beside a loss. They count as such if they are typically farther from the ends of the curves than
    half of that fall. Then the gain is the distance from the best score to the upper quartile.

    good: the trials that did not diverge.
    """
    scores = np.array([o.value for o in good])
    best = float(scores.min())
    fall = best_fall(good)
    distance = float(np.median([abs(o.value - o.tail) for o in good]))
    if fall <= 0 or distance > fall / 2:
        fall = float(np.quantile(scores, 0.75)) - best
    # Never zero, so that scores that are all equal can be divided by it.
    return max(fall, 1e-6 * (1.0 + abs(best)))


def best_fall(observations: Sequence[Observation]) -> float:
    """Return how far the best curve fell from the usual start, 0 if no curve fell.

    All runs start from the same model, so the median of their starts is more certain than the start
    of one run, which may be low by chance.
    """
    ends = [o.tail for o in observations if math.isfinite(o.tail) and o.tail < o.start]
    return max(0.0, usual_start(observations) - min(ends, default=math.inf))


def usual_start(observations: Sequence[Observation]) -> float:
    """Return the median start of the runs, 0 if there are no runs."""
    return _median(o.start for o in observations)


def usual_noise(observations: Sequence[Observation]) -> float:
    """Return the median noise of the runs' curves, 0 if there are no runs."""
    return _median(o.noise for o in observations)


def _median(values: Iterable[float]) -> float:
    return float(np.median([*values] or [0.0]))


# --- which runs diverged, and which learned -------------------------------------------------------


def diverged(observations: Sequence[Observation]) -> set[Observation]:
    """Return the runs that diverged: they were stopped for it, have a value that is not finite, or
    ended far above their start.

    "Far" is a quarter of the best gain, and more than the noise of the curves explains. If no run
    gained anything, "far" is more than the noise. The last rule does not apply if the user's code
    returned the scores, because they may not be comparable with the curve.
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
    """Return the observations below the lowest learning rate that diverged. A run above it that
    stayed finite was lucky.
    """
    cliff = min((o.x for o in observations if o in lost), default=math.inf)
    return [o for o in observations if o.x < cliff]


def end_of(observations: Sequence[Observation], rank: int | None) -> str:
    """Return "lowest" or "highest" if the best learning rate of a rank is the lowest or highest one
    that was tried there, else "". A best learning rate that ties with another one counts as inside.

    The learning rates are compared by their mean score over seeds. The single lowest score would
    often belong to a lucky seed, above all where the loss hardly depends on the learning rate.
    """
    scores: dict[float, list[float]] = {}
    for o in observations:
        if o.rank == rank:
            scores.setdefault(o.x, []).append(o.value)
    means = {x: sum(values) / len(values) for x, values in scores.items()}
    least = min(means.values(), default=math.inf)
    best = [x for x, mean in means.items() if mean == least]
    if len(means) < 2 or len(best) > 1 or not math.isfinite(least):
        return ""
    return {min(means): "lowest", max(means): "highest"}.get(best[0], "")


def end_note(observations: Sequence[Observation], rank: int | None) -> str:
    """Return a sentence if a rank's best learning rate is the lowest or the highest one tried, and
    "" if it lies between others.
    """
    end = end_of(observations, rank)
    if not end:
        return ""
    words = "full finetuning" if rank is None else f"rank {rank}"
    return (
        f"{words}: the best learning rate is the {end} that was tried, so a"
        f" {'lower' if end == 'lowest' else 'higher'} one may be better still"
    )


def all_rose(observations: Iterable[Observation]) -> bool:
    """Return whether every run's curve ended clearly above its first value. Then all learning rates
    may be too high.
    """
    return all(o.tail > o.first + ROSE * o.noise for o in observations)


def none_learned(observations: Sequence[Observation]) -> bool:
    """Return whether no run learned more than the noise of the curves explains.

    A run learned if its curve ended clearly below its first value. It also learned if it ended
    clearly below the end of another curve and did not rise.
    """
    noise = usual_noise(observations)
    rise = ROSE * noise
    highest = max((o.tail for o in observations), default=0.0) - CLEAR * noise

    def learned(o: Observation) -> bool:
        return o.tail < o.first - rise or o.tail < min(o.first + rise, highest)

    return not any(learned(o) for o in observations)
