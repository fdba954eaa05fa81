"""What a suite's runs show: which grids are on file, the best rate of each rank, and its exponent in the rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from study.best_rates import best_rate, slope
from study.configurations import CONFIGS, RSLORA, START, start_of
from study.domains import names
from study.grids import Cell, Losses, all_means, curve, curves_by_seed, lowest
from study.moving import octaves

from rankaware_optim import Law

T90 = {2: 6.31, 3: 2.92}  # Student's t, 90 % two-sided, by number of seeds
CLIFF = 0.1  # share of the gain that is lost at the cliff


def domains_in(done: Losses) -> list[str]:
    """The domains that have a loss before training and at least one configuration with a grid."""
    begun = {job.domain for job in done if job.scheme == START}
    return [name for name in names() if name in begun and schemes_in(done, name)]


def schemes_in(done: Losses, domain: str) -> list[str]:
    """The configurations that have a grid, in their order."""
    return [name for name in (*CONFIGS, *RSLORA) if ranks_in(done, domain, name)]


def ranks_in(done: Losses, domain: str, scheme: str) -> list[int]:
    """The ranks with at least three rates that every seed has run. An unfinished suite has fewer ranks."""
    seeds = seeds_in(done, domain, scheme)
    ranks = sorted({job.rank for job in done if job[:2] == (domain, scheme)})
    return [
        rank for rank in ranks if len(curve(done, (domain, scheme, rank), seeds)) >= 3
    ]


def seeds_in(done: Losses, domain: str, scheme: str) -> int:
    return len({job.seed for job in done if job[:2] == (domain, scheme)})


class Optimum(NamedTuple):
    """log2 of a cell's best rate or cliff; None if it is outside the grid.

    Args:
        x: from the mean loss over seeds.
        by_seed: from the losses of each seed.
    """

    x: float | None
    by_seed: tuple[float | None, ...]


Estimator = Callable[[Losses, Cell], Optimum]


def optimum(done: Losses, cell: Cell) -> Optimum:
    """The best rate, by `best_rate`."""
    seeds = seeds_in(done, *cell[:2])
    means, start = curve(done, cell, seeds), start_of(cell[0], done)
    if not means:
        return Optimum(None, ())
    return Optimum(
        best_rate(means, start),
        tuple(best_rate(each, start) for each in curves_by_seed(done, cell, seeds)),
    )


def cliff(done: Losses, cell: Cell) -> Optimum:
    """The rate above the best one at which a tenth of the gain is lost."""
    seeds, start = seeds_in(done, *cell[:2]), start_of(cell[0], done)
    means = curve(done, cell, seeds)
    if not means:
        return Optimum(None, ())
    x = cliff_of(tried_rates(done, cell, seeds), lowest(means), start)
    return Optimum(
        x,
        tuple(
            cliff_of(each, lowest(each), start)
            for each in curves_by_seed(done, cell, seeds)
        ),
    )


def cliff_of(tried: Mapping[float, float], best: float, start: float) -> float | None:
    return crossing(tried, best, tried[best] + CLIFF * (start - tried[best]), 1)


def crossing(
    tried: Mapping[float, float], best: float, level: float, way: int
) -> float | None:
    """log2 of the first rate, from the best in one direction, where the loss reaches a level; None if it does not.

    The loss is interpolated linearly between rates. If a rate diverged, the crossing is half way to it.

    Args:
        tried: mean loss by log2 rate.
        best: log2 of the best rate.
        level: the loss to reach.
        way: 1 to higher rates, -1 to lower ones.
    """
    xs = sorted((x for x in tried if (x - best) * way >= 0), reverse=way < 0)
    for near, far in pairwise(xs):
        if tried[far] >= level:
            share = (
                (level - tried[near]) / (tried[far] - tried[near])
                if math.isfinite(tried[far])
                else 0.5
            )
            return near + share * (far - near)
    return None


def tried_rates(done: Losses, cell: Cell, seeds: int) -> dict[float, float]:
    """Mean loss over all seeds by log2 rate; beyond these rates, the losses of the coarse pass of one seed."""
    means = all_means(done, cell, seeds)
    low, high = min(means), max(means)
    coarse = curve(done, cell, 1)
    beyond = {x: loss for x, loss in coarse.items() if not low <= x <= high}
    return beyond | means


ESTIMATORS: dict[str, Estimator] = {"vertex": optimum, "cliff": cliff}


def best_rates(
    done: Losses, domain: str, scheme: str, by: Estimator = optimum
) -> dict[int, float]:
    """log2 of the best rate (or of the cliff) by rank, for ranks that have it inside their grid."""
    found = {
        rank: by(done, (domain, scheme, rank)).x
        for rank in ranks_in(done, domain, scheme)
    }
    return {rank: x for rank, x in found.items() if x is not None}


class Exponent(NamedTuple):
    """Slope of log2 best rate over log2 rank: mean over seeds, and half of its 90 % interval (None for one seed)."""

    ranks: tuple[int, ...]
    slope: float
    half: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.slope:+.2f}" + (
            "" if self.half is None else f" ± {self.half:.2f}"
        )


def exponent_of(
    done: Losses, domain: str, scheme: str, by: Estimator = optimum
) -> Exponent | None:
    """The exponent in a domain and configuration.

    None if fewer than two ranks have their best rate (or cliff) inside the grid of every seed.
    """
    found = {
        rank: by(done, (domain, scheme, rank))
        for rank in ranks_in(done, domain, scheme)
    }
    usable = {
        rank: best.by_seed
        for rank, best in found.items()
        if best.by_seed and None not in best.by_seed
    }
    if len(usable) < 2:
        return None
    seeds = range(len(next(iter(usable.values()))))
    slopes = [
        slope({rank: best[seed] or 0.0 for rank, best in usable.items()})
        for seed in seeds
    ]
    spread = (
        T90[len(slopes)] * statistics.stdev(slopes) / math.sqrt(len(slopes))
        if len(slopes) in T90
        else None
    )
    return Exponent(tuple(usable), statistics.fmean(slopes), spread, len(slopes))


def law_slope(domain: str, scheme: str, ranks: Sequence[int], law: Law) -> float:
    """The exponent that a law predicts over these ranks."""
    return slope({rank: octaves(domain, scheme, rank, law) for rank in ranks})
