"""Which runs a sweep asks for, and what stands on its grid: octaves of rate, centred and extended by what is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

FULL = 0  # stands for full finetuning in a rank's place


class Job(NamedTuple):
    """A run: the scheme (optimizer, law or configuration), the rank, log2 of the base rate, the seed."""

    domain: str
    scheme: str
    rank: int
    x: float
    seed: int


Losses = Mapping[Job, float | None]  # held-out, None where the run diverged
Cell = tuple[str, str, int]  # domain, scheme, rank


class Wanting(Protocol):
    """What knows which runs are missing."""

    def wanted(self, done: Losses) -> list[Job]: ...


@dataclass(frozen=True)
class Listed:
    """Runs known beforehand."""

    jobs: Sequence[Job]

    def wanted(self, done: Losses) -> list[Job]:
        return [job for job in self.jobs if job not in done]


@dataclass(frozen=True)
class Together:
    """Several at once, so that no worker waits for the end of one."""

    grids: Sequence[Wanting]

    def wanted(self, done: Losses) -> list[Job]:
        return [job for grid in self.grids for job in grid.wanted(done)]


@dataclass(frozen=True)
class Grid:
    """Octaves of rate to try: a coarse pass of one seed places the centre, `half` octaves go to either side of it.

    coarse: log2 rates by scheme. placed_at: the rank whose coarse pass places the grid of all; by default each its
    own. A grid whose best mean lies at its edge grows there by an octave, up to `most` times.
    """

    cells: Sequence[Cell]
    coarse: Mapping[str, Sequence[int]]
    seeds: int = 3
    half: int = 3
    placed_at: int | None = None
    most: int = 6

    def wanted(self, done: Losses) -> list[Job]:
        """The runs still missing, as far as those done tell."""
        placing = dict.fromkeys(map(self._placed_by, self.cells))
        first = [Job(*cell, x, 0) for cell in placing for x in self.coarse[cell[1]]]
        for stage in (lambda: first, lambda: self._all(self._fine, done), lambda: self._all(self._moved, done)):
            if missing := [job for job in stage() if job not in done]:
                return missing
        return []

    def _placed_by(self, cell: Cell) -> Cell:
        return cell if self.placed_at is None else (cell[0], cell[1], self.placed_at)

    def _all(self, of: Callable[[Cell, Losses], list[Job]], done: Losses) -> list[Job]:
        return [job for cell in self.cells for job in of(cell, done)]

    def _moved(self, cell: Cell, done: Losses) -> list[Job]:
        """The best rate of the cell that placed this one's grid, tried here too."""
        x = lowest(curve(done, self._placed_by(cell), self.seeds))
        return [Job(*cell, x, seed) for seed in range(self.seeds)]

    def _fine(self, cell: Cell, done: Losses) -> list[Job]:
        centre = lowest({x: or_inf(done[Job(*self._placed_by(cell), x, 0)]) for x in self.coarse[cell[1]]})
        low, high = centre - self.half, centre + self.half
        for _ in range(self.most + 1):
            jobs = [Job(*cell, x, seed) for x in range(low, high + 1) for seed in range(self.seeds)]
            if any(job not in done for job in jobs):
                return jobs
            best = lowest(curve(done, cell, self.seeds))
            low, high = low - (best <= low), high + (best >= high)
        return jobs


def curve(done: Losses, cell: Cell, seeds: int) -> dict[float, float]:
    """{log2 rate: mean loss over the seeds} where all seeds were run, by rising rate; infinite where one diverged."""
    xs = sorted({job.x for job in done if job[:3] == cell})
    by_seed = {x: [Job(*cell, x, seed) for seed in range(seeds)] for x in xs}
    whole = [x for x, jobs in by_seed.items() if all(job in done for job in jobs)]
    return {x: math.fsum(losses_at(done, cell, x, seeds)) / seeds for x in whole}


def losses_at(done: Losses, cell: Cell, x: float, seeds: int) -> list[float]:
    """The loss of every seed at a rate, infinite where it diverged."""
    return [or_inf(done[Job(*cell, x, seed)]) for seed in range(seeds)]


def curves_by_seed(done: Losses, cell: Cell, seeds: int) -> list[dict[float, float]]:
    """Every seed's {log2 rate: loss} at the rates that all seeds have run."""
    by_rate = {x: losses_at(done, cell, x, seeds) for x in curve(done, cell, seeds)}
    return [{x: losses[seed] for x, losses in by_rate.items()} for seed in range(seeds)]


def lowest(losses: Mapping[float, float]) -> float:
    """The rate of the lowest loss."""
    return min(losses, key=losses.__getitem__)


def or_inf(loss: float | None) -> float:
    """A loss as a number: infinite where the run diverged."""
    return math.inf if loss is None else loss
