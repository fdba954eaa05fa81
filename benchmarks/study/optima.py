"""What a suite's runs say: which grids there are, each rank's best rate, and its exponent in the rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from study.best_rates import best_rate, slope
from study.configurations import CONFIGS, RSLORA, START, start_of
from study.domains import names
from study.grids import Cell, Losses, curve, curves_by_seed
from study.moving import octaves

from rankaware_optim import Law

T90 = {2: 6.31, 3: 2.92}  # Student's t, 90 % two-sided, by number of seeds


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
    """The best rate of a cell: log2, by the mean over seeds and seed by seed; None at an edge."""

    x: float | None
    by_seed: tuple[float | None, ...]


def optimum(done: Losses, cell: Cell) -> Optimum:
    seeds = seeds_in(done, *cell[:2])
    means, start = curve(done, cell, seeds), start_of(cell[0], done)
    if not means:
        return Optimum(None, ())
    return Optimum(best_rate(means, start), tuple(best_rate(each, start) for each in curves_by_seed(done, cell, seeds)))


def best_rates(done: Losses, domain: str, scheme: str) -> dict[int, float]:
    """log2 of the best rate at every rank that has it inside its grid."""
    found = {rank: optimum(done, (domain, scheme, rank)).x for rank in ranks_in(done, domain, scheme)}
    return {rank: x for rank, x in found.items() if x is not None}


class Exponent(NamedTuple):
    """Slope of log2 best rate over log2 rank: the mean over seeds, and half its 90 % interval; None for one seed."""

    ranks: tuple[int, ...]
    slope: float
    half: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.slope:+.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")


def exponent_of(done: Losses, domain: str, scheme: str) -> Exponent | None:
    """None where fewer than two ranks have their best inside the grid."""
    found = {rank: optimum(done, (domain, scheme, rank)) for rank in ranks_in(done, domain, scheme)}
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
