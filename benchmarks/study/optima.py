"""What a suite's runs say: which grids there are, each rank's best rate, and its exponent in the rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from study.best_rates import best_rate, slope
from study.configurations import CONFIGS, RSLORA, START, start_of
from study.domains import names
from study.grids import Cell, Losses, curve, curves_by_seed, lowest
from study.moving import octaves

from rankaware_optim import Law

T90 = {2: 6.31, 3: 2.92}  # Student's t, 90 % two-sided, by number of seeds
CLIFF = 0.1  # share of the gain that is lost at the cliff


def domains_in(done: Losses) -> list[str]:
    """Those with a loss before training and a configuration with a grid."""
    begun = {job.domain for job in done if job.scheme == START}
    return [name for name in names() if name in begun and schemes_in(done, name)]


def schemes_in(done: Losses, domain: str) -> list[str]:
    """The configurations on file, in their order."""
    return [name for name in (*CONFIGS, *RSLORA) if ranks_in(done, domain, name)]


def ranks_in(done: Losses, domain: str, scheme: str) -> list[int]:
    """The ranks that have three rates or more on every seed: of a suite cut short, those it came to."""
    seeds = seeds_in(done, domain, scheme)
    ranks = sorted({job.rank for job in done if job[:2] == (domain, scheme)})
    return [rank for rank in ranks if len(curve(done, (domain, scheme, rank), seeds)) >= 3]


def seeds_in(done: Losses, domain: str, scheme: str) -> int:
    return len({job.seed for job in done if job[:2] == (domain, scheme)})


class Optimum(NamedTuple):
    """A rate of a cell: log2, by the mean over seeds and seed by seed; None where the grid does not reach it."""

    x: float | None
    by_seed: tuple[float | None, ...]


Estimator = Callable[[Losses, Cell], Optimum]


def optimum(done: Losses, cell: Cell) -> Optimum:
    """The best rate."""
    seeds = seeds_in(done, *cell[:2])
    means, start = curve(done, cell, seeds), start_of(cell[0], done)
    if not means:
        return Optimum(None, ())
    return Optimum(best_rate(means, start), tuple(best_rate(each, start) for each in curves_by_seed(done, cell, seeds)))


def cliff(done: Losses, cell: Cell) -> Optimum:
    """The rate above the best at which a tenth of the gain is lost."""
    seeds, start = seeds_in(done, *cell[:2]), start_of(cell[0], done)
    means = curve(done, cell, seeds)
    if not means:
        return Optimum(None, ())
    x = cliff_of(tried_rates(done, cell, seeds), lowest(means), start)
    return Optimum(x, tuple(cliff_of(each, lowest(each), start) for each in curves_by_seed(done, cell, seeds)))


def cliff_of(tried: Mapping[float, float], best: float, start: float) -> float | None:
    return crossing(tried, best, tried[best] + CLIFF * (start - tried[best]), 1)


def crossing(tried: Mapping[float, float], best: float, level: float, way: int) -> float | None:
    """Where the loss, from its lowest in one direction, first reaches a level; None where it does not.

    On straight lines; half way to a rate that diverged.
    """
    xs = sorted((x for x in tried if (x - best) * way >= 0), reverse=way < 0)
    for near, far in pairwise(xs):
        if tried[far] >= level:
            share = (level - tried[near]) / (tried[far] - tried[near]) if math.isfinite(tried[far]) else 0.5
            return near + share * (far - near)
    return None


def tried_rates(done: Losses, cell: Cell, seeds: int) -> dict[float, float]:
    """A cell's mean losses, and beyond the grid of all seeds those of the coarse pass of one."""
    means = curve(done, cell, seeds)
    low, high = min(means), max(means)
    return {x: loss for x, loss in curve(done, cell, 1).items() if not low <= x <= high} | means


ESTIMATORS: dict[str, Estimator] = {"vertex": optimum, "cliff": cliff}


def best_rates(done: Losses, domain: str, scheme: str, by: Estimator = optimum) -> dict[int, float]:
    """log2 of the best rate, or of the cliff, at every rank that has it inside its grid."""
    found = {rank: by(done, (domain, scheme, rank)).x for rank in ranks_in(done, domain, scheme)}
    return {rank: x for rank, x in found.items() if x is not None}


class Exponent(NamedTuple):
    """Slope of log2 best rate over log2 rank: the mean over seeds, and half its 90 % interval; None for one seed."""

    ranks: tuple[int, ...]
    slope: float
    half: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.slope:+.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")


def exponent_of(done: Losses, domain: str, scheme: str, by: Estimator = optimum) -> Exponent | None:
    """None where fewer than two ranks have their best, or their cliff, inside every seed's grid."""
    found = {rank: by(done, (domain, scheme, rank)) for rank in ranks_in(done, domain, scheme)}
    usable = {rank: best.by_seed for rank, best in found.items() if best.by_seed and None not in best.by_seed}
    if len(usable) < 2:
        return None
    seeds = range(len(next(iter(usable.values()))))
    slopes = [slope({rank: best[seed] or 0.0 for rank, best in usable.items()}) for seed in seeds]
    spread = T90[len(slopes)] * statistics.stdev(slopes) / math.sqrt(len(slopes)) if len(slopes) in T90 else None
    return Exponent(tuple(usable), statistics.fmean(slopes), spread, len(slopes))


def law_slope(domain: str, scheme: str, ranks: Sequence[int], law: Law) -> float:
    """The exponent that a law gives."""
    return slope({rank: octaves(domain, scheme, rank, law) for rank in ranks})
