"""Trials as input of the fit: scores, starts and ends of loss curves, and arms of the loss model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ._loss_model import CAP, Arm

TAIL = 5  # fewest values in the mean that scores a run
EARLY = 0.3  # share of its steps before which a run is not judged
# a mean of `TAIL` values is clearly higher if it is by this many standard deviations of a value
CLEAR = 1.5

Curve = Sequence[float] | npt.NDArray[np.float64]

_OF_SECOND_DIFFERENCES = 0.6745 * math.sqrt(
    6.0
)  # their median absolute value, if a value's standard deviation is 1


@dataclass(frozen=True)
class Observation:
    """One finished trial.

    Args:
        rank: None for full finetuning.
        seed: the trial's random seed.
        x: log2 of the base rate.
        value: the score, minimised.
        start: where the loss curve began, see `height`.
        tail: the mean of the last tenth of the curve.
        returned: whether the training function returned the score. Otherwise the score is `tail`.
        stopped: whether the trial was stopped because it diverged.
        first: the first value of the curve; infinite if it is unknown.
        noise: standard deviation of a value of the curve, see `noise_of`.
    """

    rank: int | None
    seed: int
    x: float
    value: float
    start: float
    tail: float
    returned: bool = False
    stopped: bool = False
    first: float = math.inf
    noise: float = 0.0


def height(curve: Curve) -> float:
    """Return where a loss curve begins: its first value, or the median of the first few if that is
    higher.
    """
    return float(max(curve[0], statistics.median(curve[:TAIL])))


def recent(curve: Curve, count: int = TAIL) -> float:
    """Return the mean of the last `count` values."""
    last = curve[-count:]
    return float(sum(last) / len(last))


def noise_of(curve: Curve) -> float:
    """Return the standard deviation of a value of the curve about its trend, as batches differ; 0
    if it is too short.

    Second differences remove the trend, and their median absolute value ignores jumps.
    """
    values = np.asarray(curve, dtype=np.float64)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore", invalid="ignore"):
        bends = np.abs(values[:-2] - 2 * values[1:-1] + values[2:])
    return float(np.median(bends)) / _OF_SECOND_DIFFERENCES if len(bends) else 0.0


def impute(x: float, curve: Curve, best: Observation, beside: Curve) -> Observation | None:
    """Impute the final score of a pruned run from its gap to the best paired run.

    The gap when it was stopped is taken as the gap at the end. Without imputation the fit would not
    see that a rate too high was tried.

    Args:
        x: log2 of the pruned run's base rate.
        curve: its losses until it was stopped.
        best: the best run of the same rank and seed.
        beside: that run's losses.

    Returns:
        The run with its imputed score, or None if it was stopped in the first 30 % of its steps.
    """
    if len(curve) < max(1.0, EARLY * len(beside)):
        return None
    gap = max(0.0, recent(curve) - recent(beside[: len(curve)]))
    return replace(best, x=x, value=best.value + gap, start=height(curve), tail=best.tail + gap)


def arms_of(
    observations: Sequence[Observation], bad: Sequence[bool], gain: float
) -> dict[int | None, Arm]:
    """Return the trials of every rank in the units of the loss model.

    Args:
        observations: the trials.
        bad: for each trial, whether it counts as untrained. Its gap is then `CAP`.
        gain: what training gains.
    """
    arms = {}
    for rank in dict.fromkeys(o.rank for o in observations):
        mine = [(o, b) for o, b in zip(observations, bad, strict=True) if o.rank == rank]
        best = min((o.value for o, b in mine if not b), default=0.0)
        gaps = [CAP if b else min((o.value - best) / gain, CAP) for o, b in mine]
        arms[rank] = Arm(
            np.array([o.x for o, _ in mine]), np.array(gaps), np.array([o.seed for o, _ in mine])
        )
    return arms


def gain_of(good: Sequence[Observation]) -> float:
    """Return what training can gain, the unit of curvature and noise: the best fall of a curve from
    the usual start.

    If the scores were returned and are not comparable with the curve, it is the best score against
    a poor one.
    """
    values = np.array([o.value for o in good])
    fall = best_fall(good)
    apart = float(np.median([abs(o.value - o.tail) for o in good]))
    if fall <= 0 or apart > fall / 2:
        fall = float(np.quantile(values, 0.75) - values.min())
    return max(fall, 1e-6 * (1.0 + abs(float(values.min()))))


def best_fall(observations: Sequence[Observation]) -> float:
    """Return how far the best curve fell from the usual start; 0 if none fell.

    All runs start from the same model, so the median of their starts replaces a first value that is
    low by chance.
    """
    usual, fell = (
        usual_start(observations),
        [o for o in observations if math.isfinite(o.tail) and o.tail < o.start],
    )
    return max([0.0, *(usual - o.tail for o in fell)])


def usual_start(observations: Sequence[Observation]) -> float:
    """Return the median start of the runs; 0 if there are none."""
    return float(np.median([o.start for o in observations])) if observations else 0.0


def usual_noise(observations: Sequence[Observation]) -> float:
    """Return the median noise of the runs' curves; 0 if there are none."""
    return float(np.median([o.noise for o in observations])) if observations else 0.0
