"""Best rates from few runs: which runs a cell asks for, two estimators of its best rate, and their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from study.grids import Cell, Job, Losses, all_means, losses_at, lowest, or_inf
from study.optima import cliff_of, crossing

WIDE = 2  # whole octaves to either side of the guess at first
NEAR = 0.01  # share of the gain
WHICH = ("middle", "cliff")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Around:
    """Jobs of a cell: whole octaves of seed 0 around `guess`, growing at an edge, then half octaves of all seeds."""

    cell: Cell
    guess: int
    seeds: int

    def wanted(self, done: Losses) -> list[Job]:
        low, high = self.guess - WIDE, self.guess + WIDE
        while True:
            jobs = [Job(*self.cell, float(x), 0) for x in range(low, high + 1)]
            if missing := [job for job in jobs if job not in done]:
                return missing
            best = lowest({job.x: or_inf(done[job]) for job in jobs})
            if low < best < high or high - low > 4 * WIDE:
                break
            low, high = low - (best <= low), high + (best >= high)
        fine = [
            Job(*self.cell, best + half / 2, seed)
            for half in range(-2, 3)
            for seed in range(self.seeds)
        ]
        return [job for job in fine if job not in done]


class Estimate(NamedTuple):
    """log2 of a best rate by both estimators, and mean loss by log2 rate.

    The middle is that of the basin, where the loss is above its lowest by at most 1 % of the gain or two standard
    errors. The cliff is the rate above the lowest at which 10 % of the gain is lost. Each is None where runs do not
    reach that far.
    """

    middle: float | None
    cliff: float | None
    means: Mapping[float, float]


class Found(NamedTuple):
    """A cell's estimates, from all seeds together and from each alone, and the loss before training."""

    both: Estimate
    by_seed: tuple[Estimate | None, ...]
    start: float


def estimate(done: Losses, cell: Cell, start: float, seeds: int) -> Estimate | None:
    """Estimate a cell's best rate; None where its half octaves are incomplete. `start` is the loss before training."""
    means = all_means(done, cell, seeds)
    if len(means) < 5 or all(x.is_integer() for x in means):
        return None
    best = lowest(means)
    at_best = losses_at(done, cell, best, seeds)
    shift = means[best] - at_best[0]  # puts seed 0's octaves on the level of the means
    tried = {x: loss + shift for x, loss in all_means(done, cell, 1).items()} | means
    gain = start - means[best]
    bottom = means[best] + max(NEAR * gain, 2 * standard_error(done, cell, best, seeds))
    left, right = crossing(tried, best, bottom, -1), crossing(tried, best, bottom, 1)
    middle = None if left is None or right is None else (left + right) / 2
    return Estimate(middle, cliff_of(tried, best, start), tried)


def standard_error(done: Losses, cell: Cell, best: float, seeds: int) -> float:
    """Standard error over seeds of the change in loss from the best rate to half an octave beside it.

    This is the larger one of the two sides. It is 0 where both sides diverged, and where there is one seed.
    """
    at_best = losses_at(done, cell, best, seeds)
    errors = []
    for x in (best - 0.5, best + 0.5):
        if Job(*cell, x, seeds - 1) not in done:
            continue
        beside = losses_at(done, cell, x, seeds)
        changes = [there - here for there, here in zip(beside, at_best, strict=True)]
        if len(changes) > 1 and math.isfinite(sum(changes)):
            errors.append(statistics.stdev(changes))
    return max(errors, default=0.0) / math.sqrt(seeds)


def alone(
    done: Losses, cell: Cell, start: float, seeds: int
) -> tuple[Estimate | None, ...]:
    """Estimates from each seed's runs alone."""
    found = []
    for seed in range(seeds):
        own = {job._replace(seed=0): x for job, x in done.items() if job.seed == seed}
        found.append(estimate(own, cell, start, 1))
    return tuple(found)


def rates_of(found: Mapping[Key, Found], which: str) -> dict[Key, float]:
    """log2 best rates by one estimator, for the cells where it has an estimate."""
    return {
        key: x
        for key, each in found.items()
        if (x := getattr(each.both, which)) is not None
    }


def noise(found: Mapping[Key, Found], which: str) -> float:
    """Standard error of an estimate over two seeds: half their difference, rms over cells."""
    pairs = [
        [getattr(one, which, None) for one in each.by_seed] for each in found.values()
    ]
    complete = [pair for pair in pairs if len(pair) == 2 and None not in pair]
    return rms((a - b) / 2 for a, b in complete)


def rms(errors: Iterable[float]) -> float:
    squares = [e * e for e in errors]
    return math.sqrt(statistics.fmean(squares)) if squares else math.nan
