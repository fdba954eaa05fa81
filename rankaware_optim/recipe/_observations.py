"""What trials showed, as the fit reads them: scores, where curves began and ended, and the loss model's arms."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ._loss_model import CAP, Arm, Place

TAIL = 5  # values at least in the mean that scores a run
EARLY = 0.3  # share of its steps in which a run is not judged


@dataclass(frozen=True)
class Observation:
    """One finished trial. rank: None for full finetuning. x: log2 of the base rate. value: the score, minimised.

    start, tail: where the curve began (see `height`) and the mean of its last tenth. returned: whether the score was
    returned rather than that mean. stopped: cut short because it diverged. steps, batch: see `Place`.
    """

    rank: int | None
    seed: int
    x: float
    value: float
    start: float
    tail: float
    returned: bool = False
    stopped: bool = False
    steps: int | None = None
    batch: float | None = None

    @property
    def place(self) -> Place:
        return Place(self.rank, self.steps, self.batch)


def height(curve: Sequence[float]) -> float:
    """Where a run begins: its first value, or the median of the first few where its first batch was an easy one."""
    return max(curve[0], statistics.median(curve[:TAIL]))


def recent(curve: Sequence[float], count: int = TAIL) -> float:
    """Mean of the last `count` values."""
    last = curve[-count:]
    return sum(last) / len(last)


def carried_on(x: float, curve: Sequence[float], best: Observation, beside: Sequence[float]) -> Observation | None:
    """What the fit makes of a run at x that was stopped as worse than `best`, whose curve is `beside`.

    It ends as far above it as it lay when it was stopped: left out, a rate too high would seem never to have been
    tried. Stopped in its first 30 %, a run says nothing, which is None.
    """
    if len(curve) < max(1.0, EARLY * len(beside)):
        return None
    gap = max(0.0, recent(curve) - recent(beside[: len(curve)]))
    return replace(best, x=x, value=best.value + gap, start=height(curve), tail=best.tail + gap)


def arms_of(observations: Sequence[Observation], bad: Sequence[bool], gains: Mapping[Place, float]) -> dict[Place, Arm]:
    """The trials of every place in the units of the loss model, those that are `bad` at `CAP`.

    gains: by steps and batch, the rank left out.
    """
    arms = {}
    for place in dict.fromkeys(o.place for o in observations):
        mine = [(o, b) for o, b in zip(observations, bad, strict=True) if o.place == place]
        best = min((o.value for o, b in mine if not b), default=0.0)
        gain = gains.get(place._replace(rank=None), 1.0)  # without one, all of its runs diverged
        gaps = [CAP if b else min((o.value - best) / gain, CAP) for o, b in mine]
        arms[place] = Arm(np.array([o.x for o, _ in mine]), np.array(gaps), np.array([o.seed for o, _ in mine]))
    return arms


def gain_of(good: Sequence[Observation]) -> float:
    """What training can gain, the unit of curvature and noise: the best fall of a curve from the usual start.

    Where scores were returned and are of another kind than the curve, it is the best score against a poor one.
    """
    values = np.array([o.value for o in good])
    usual = usual_start(good)
    fall = max((usual - o.tail for o in good if o.tail < o.start), default=0.0)
    apart = float(np.median([abs(o.value - o.tail) for o in good]))
    if fall <= 0 or apart > fall / 2:
        fall = float(np.quantile(values, 0.75) - values.min())
    return max(fall, 1e-6 * (1.0 + abs(float(values.min()))))


def usual_start(observations: Sequence[Observation]) -> float:
    """Where runs begin, in the median; 0 where none ran."""
    return float(np.median([o.start for o in observations])) if observations else 0.0
