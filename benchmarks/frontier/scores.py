"""What a rate or a run loses, on the stored sweeps: at a task's own steps, and at 400 steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from calibration.surfaces import gap_of
from frontier.runs import STORE, TASKS
from study import longer
from study.configurations import TUNED, start_of
from study.domains import HELD_OUT, STUDY
from study.grids import FULL, Cell, Losses, all_means, curve, losses_at, lowest
from study.loss_curves import DIVERGED
from study.optima import ranks_in, seeds_in
from study.regret import best_by_seed
from study.runs_on_file import read
from study.suite import STORES, finished_in

OURS = "this package"  # who advises a way of ours
OWN = 0  # in place of a number of steps: a task's own


@dataclass(frozen=True)
class Sweeps:
    """The sweeps of a task at one number of steps."""

    task: str
    steps: int

    @property
    def done(self) -> Losses:
        return runs_of(self.task, self.steps)

    def cell(self, config: str, rank: int) -> Cell:
        return self.task, "full" if rank == FULL else config, rank

    def seeds(self, config: str, rank: int) -> int:
        return seeds_in(self.done, *self.cell(config, rank)[:2])

    def has(self, config: str) -> bool:
        """Whether rank 16 was swept in a configuration."""
        return TUNED in ranks_in(self.done, self.task, config)

    def targets(self, config: str) -> list[int]:
        """Ranks other than the one that is tuned, and full finetuning."""
        ranks = ranks_in(self.done, self.task, config)
        return [*(rank for rank in ranks if rank != TUNED), FULL]

    def unseen(self, *seen: int) -> list[int]:
        """The seeds that a way has not seen. Where a task has one seed it is that one."""
        every = range(self.seeds("full", FULL))
        return [seed for seed in every if seed not in seen] or [*every]

    def best_by_seed(self, config: str, rank: int) -> list[float]:
        """log2 of the best rate of each seed's sweep."""
        return best_by_seed(self.done, self.cell(config, rank))

    def lowest(self, config: str, rank: int) -> float:
        """log2 of the rate with the lowest mean loss of all that were run."""
        cell = self.cell(config, rank)
        return lowest(all_means(self.done, cell, self.seeds(config, rank)))

    def lost_at(self, config: str, rank: int, x: float, seeds: Sequence[int]) -> float:
        """The share of the gain lost at 2^x, on these seeds.

        By the study's spline through every rate that they have run, and beyond these the coarse pass of one seed.
        """
        cell, count = self.cell(config, rank), self.seeds(config, rank)
        means = all_means(self.done, cell, count)
        mine = {}
        for rate in means:
            losses = losses_at(self.done, cell, rate, count)
            mine[rate] = statistics.fmean(losses[seed] for seed in seeds)
        coarse = curve(self.done, cell, 1)
        low, high = min(means), max(means)
        beyond = {at: loss for at, loss in coarse.items() if not low <= at <= high}
        tried = {
            at: loss if math.isfinite(loss) else None
            for at, loss in (beyond | mine).items()
        }
        at_best, start = mine[lowest(means)], start_of(self.task, self.done)
        return gap_of(tried, at_best, start)(x)

    def lost_by(
        self, config: str, rank: int, loss: float | None, seeds: Sequence[int]
    ) -> float:
        """The share of the gain that a run with this loss has lost, beside the sweep's best rate on these seeds."""
        if loss is None:
            return DIVERGED
        cell, count = self.cell(config, rank), self.seeds(config, rank)
        losses = losses_at(self.done, cell, self.lowest(config, rank), count)
        at_best = statistics.fmean(losses[seed] for seed in seeds)
        gain = start_of(self.task, self.done) - at_best
        return min((loss - at_best) / gain, DIVERGED)


@cache
def runs_of(task: str, steps: int) -> Losses:
    """The runs of complete grids."""
    if steps == OWN:
        return finished_in([STORES / f"{task}.jsonl"], "full")
    below = {
        job: loss
        for job, loss in read(STORE / f"{task}.jsonl").items()
        if job.scheme.count(longer.MARK) == 1
    }
    done = {**longer.on_file()[task], **below}
    return longer.runs_of_length(done, steps)


def own_steps() -> Iterator[Sweeps]:
    for task in (*STUDY, *HELD_OUT):
        yield Sweeps(task, OWN)


def of_length(steps: int) -> Iterator[Sweeps]:
    for task in TASKS:
        yield Sweeps(task, steps)
