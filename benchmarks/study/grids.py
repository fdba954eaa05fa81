"""Grids of a sweep: which runs are still missing, and the losses on the grid.

Rates are an octave apart. What was found so far decides where a grid is centred and how far it extends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

FULL = 0  # in place of a rank: full finetuning


class Job(NamedTuple):
    """A run: its domain, scheme (optimizer, law or configuration), rank, log2 of the base rate `x`, and seed."""

    domain: str
    scheme: str
    rank: int
    x: float
    seed: int


Losses = Mapping[Job, float | None]  # held-out losses; None if the run diverged
Cell = tuple[str, str, int]  # domain, scheme, rank


class Wanting(Protocol):
    """A grid or list that returns the missing runs, given those that are done."""

    def wanted(self, done: Losses) -> list[Job]: ...


@dataclass(frozen=True)
class Listed:
    """A fixed list of runs."""

    jobs: Sequence[Job]

    def wanted(self, done: Losses) -> list[Job]:
        return [job for job in self.jobs if job not in done]


@dataclass(frozen=True)
class Together:
    """Several grids at once, so that no worker waits for one grid to end."""

    grids: Sequence[Wanting]

    def wanted(self, done: Losses) -> list[Job]:
        return [job for grid in self.grids for job in grid.wanted(done)]


@dataclass(frozen=True)
class Grid:
    """Rates an octave apart around the best rate of a coarse pass of one seed.

    If the best mean loss is at an edge, the grid grows there by an octave, up to `most` times.

    Args:
        cells: the cells to sweep.
        coarse: log2 rates of the coarse pass, by scheme.
        seeds: how many seeds run every rate of the grid.
        half: octaves on either side of the centre.
        most: how often a grid may grow.
    """

    cells: Sequence[Cell]
    coarse: Mapping[str, Sequence[int]]
    seeds: int = 3
    half: int = 3
    most: int = 6

    def wanted(self, done: Losses) -> list[Job]:
        """The runs known to be missing. After these are done, more may be."""
        first = [Job(*cell, x, 0) for cell in self.cells for x in self.coarse[cell[1]]]
        missing = [job for job in first if job not in done]
        if missing:
            return missing
        return [
            job
            for cell in self.cells
            for job in self._fine(cell, done)
            if job not in done
        ]

    def _fine(self, cell: Cell, done: Losses) -> list[Job]:
        centre = lowest(
            {x: or_inf(done[Job(*cell, x, 0)]) for x in self.coarse[cell[1]]}
        )
        low, high = centre - self.half, centre + self.half
        for _ in range(self.most + 1):
            jobs = [
                Job(*cell, x, seed)
                for x in range(low, high + 1)
                for seed in range(self.seeds)
            ]
            if any(job not in done for job in jobs):
                return jobs
            best = lowest(curve(done, cell, self.seeds))
            low, high = low - (best <= low), high + (best >= high)
        return jobs


@dataclass(frozen=True)
class Line:
    """Rates an octave apart, on all seeds: one on either side of the centre, more where the best is at an edge.

    Args:
        cell: the cell.
        centre: log2 of the first rate.
        seeds: how many seeds run every rate.
    """

    cell: Cell
    centre: int
    seeds: int = 2

    def wanted(self, done: Losses) -> list[Job]:
        axis = around(self.centre, 1, 1)
        while True:
            jobs = [
                Job(*self.cell, float(x), seed)
                for x in axis
                for seed in range(self.seeds)
            ]
            missing = [job for job in jobs if job not in done]
            if missing:
                return missing
            means = curve(done, self.cell, self.seeds)
            best = min(axis, key=lambda x: means[x])
            wider = grown(axis, best)
            if wider == axis:
                return []
            axis = wider

    def best(self, done: Losses) -> int:
        """log2 of the rate with the lowest mean loss."""
        return round(lowest(curve(done, self.cell, self.seeds)))


Means = Callable[[Losses, Cell, int], dict[float, float]]
MOST = 9  # rates of an axis that grows


def around(centre: int, count: int, apart: int) -> range:
    """`count` rates on either side of the centre."""
    return range(centre - count * apart, centre + count * apart + 1, apart)


def grown(axis: range, best: int) -> range:
    """The axis with one rate more where the best is at an edge."""
    if len(axis) >= MOST:
        return axis
    low = axis.start - axis.step * (best == axis[0])
    return range(low, axis.stop + axis.step * (best == axis[-1]), axis.step)


def curve(done: Losses, cell: Cell, seeds: int) -> dict[float, float]:
    """{log2 rate: mean loss} of a cell's sweep, by rising rate; infinite if a seed diverged.

    A sweep has whole octaves, which all seeds have run.
    """
    means = all_means(done, cell, seeds)
    return {x: mean for x, mean in means.items() if x == round(x)}


def all_means(done: Losses, cell: Cell, seeds: int) -> dict[float, float]:
    """The same at every rate that all seeds have run: the sweep's, and those to which a best rate was moved."""
    by_rate: dict[float, set[int]] = {}
    for job in done:
        if job[:3] == cell:
            by_rate.setdefault(job.x, set()).add(job.seed)
    whole = sorted(x for x, ran in by_rate.items() if ran >= set(range(seeds)))
    return {x: math.fsum(losses_at(done, cell, x, seeds)) / seeds for x in whole}


def losses_at(done: Losses, cell: Cell, x: float, seeds: int) -> list[float]:
    """The loss of every seed at log2 rate `x`; infinite if it diverged."""
    return [or_inf(done[Job(*cell, x, seed)]) for seed in range(seeds)]


def curves_by_seed(
    done: Losses, cell: Cell, seeds: int, means: Means = curve
) -> list[dict[float, float]]:
    """{log2 rate: loss} of every seed, at the rates of `curve` or of `all_means`."""
    by_rate = {x: losses_at(done, cell, x, seeds) for x in means(done, cell, seeds)}
    return [{x: losses[seed] for x, losses in by_rate.items()} for seed in range(seeds)]


def lowest(losses: Mapping[float, float]) -> float:
    """log2 of the rate with the lowest loss."""
    return min(losses, key=losses.__getitem__)


def or_inf(loss: float | None) -> float:
    """A loss as a number; infinite if the run diverged."""
    return math.inf if loss is None else loss
