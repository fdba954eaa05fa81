"""The order of trials and the stopping rules: ranks, lengths and seeds in turn, a budget of steps, a narrow band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ._trials import Cell, TrialRecord, Trials
from .fit import all_rose, below_cliff, diverged

_TRIALS_PER_RANK = 8
_FEWEST = 2  # finished trials of every rank before a narrow band stops the search
_SHORT_RUNS = 10  # with a budget only: most trials, as a multiple of the whole runs that it allows
# Runs of the highest rank before any other rank, since losses of different ranks cannot be compared; the most such runs
# if all of them rise; then runs of every other rank at the shortest length before any longer one.
_BRACKET, _MOST_BRACKET, _SHORT = 3, 8, 2
PER_SEED = 4  # runs of a rank at one seed before the next seed; runs of one seed share its noise


class Task(NamedTuple):
    """The steps and the batch of a run. None means that the study has only one value."""

    steps: int | None = None
    batch: float | None = None


@dataclass(frozen=True)
class Schedule:
    """The plan of a calibration: `trials` of the search, then `full_trials` of full finetuning.

    The fields are the arguments of `calibrate`. target_steps = 0 means the longest of `steps`.
    """

    ranks: tuple[int | None, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    trials: int | None = None
    budget: int | None = None
    until: float | None = None
    full_trials: int = 0
    target_steps: int = 0
    batches: tuple[float, ...] = ()
    batch: float | None = None

    @property
    def tasks(self) -> list[Task]:
        """Return the tasks of the search: the shortest length at the batch nearest to the target's, then the others."""
        lengths = self.steps if len(self.steps) > 1 or self.target_steps not in (0, *self.steps) else (None,)
        apart = {batch: abs(math.log2(batch / (self.batch or 1.0))) for batch in self.batches}
        batches: list[float | None] = [*sorted(apart, key=apart.__getitem__)] or [None]
        longer = [Task(steps, batches[0]) for steps in lengths[1:]]
        return [Task(lengths[0], batches[0]), *longer, *(Task(lengths[0], batch) for batch in batches[1:])]

    @property
    def anchor(self) -> int | None:
        """The highest rank, at which rates are bracketed and moved to other lengths and batches."""
        return max((rank for rank in self.ranks if rank is not None), default=None)

    @property
    def total(self) -> int:
        """The largest number of trials of the search."""
        if self.trials is not None:
            return self.trials
        if self.budget is not None:
            return max(_TRIALS_PER_RANK, _SHORT_RUNS * self.budget // self.steps[0])
        return _TRIALS_PER_RANK * len(self.ranks) * len(self.tasks)

    def expected(self) -> int:
        """Return the likely number of trials, for progress reports."""
        return self._searches() + self.full_trials

    def _searches(self) -> int:
        """Return the likely number of trials of the search. The remaining budget is shared among the tasks."""
        if self.budget is None:
            return self.total
        left = self.budget - self._reserved(0)
        return min(self.total, sum(left // (len(self.tasks) * self._cost(task)) for task in self.tasks))

    @property
    def _needed(self) -> int:
        """The number of runs of one length that finds the rates of all ranks."""
        return _BRACKET + _SHORT * (len(self.ranks) - 1)

    def caution(self) -> str:
        """Return a warning if a budget pays for too few runs to find the rates of all ranks, else ""."""
        runs, needed = self._searches(), self._needed
        if self.budget is None or runs >= min(needed, self.total):
            return ""
        return (
            f"budget={self.budget} leaves the search {runs} of the {needed} runs that it needs, so the rates may be "
            "far off. Give a larger budget=, or fewer full_trials=."
        )

    def _cost(self, task: Task) -> int:
        """Return the training steps of a run."""
        return task.steps or self.steps[0]

    def _reserved(self, full: int) -> int:
        """Return the training steps that the full runs still need, given how many of them have begun."""
        return (self.full_trials - full) * self.steps[-1]

    def least(self) -> int:
        """Return the smallest number of training steps with which the plan is possible."""
        return self.steps[0] + self._reserved(0)

    def next(self, trials: Trials, band: float | None = None) -> Cell | None:
        """Return what to try next, or None if the study is complete.

        Args:
            trials: the trials so far.
            band: the width of the 90 % band so far, octaves.
        """
        done = trials.counted()
        if done.hopeless():
            return None
        tried = (*done, *trials.running())
        full_follows = self.full_trials > 0
        full = Trials(t for t in tried if full_follows and t.rank is None)
        search = Trials(t for t in tried if not (full_follows and t.rank is None))
        left = math.inf if self.budget is None else self.budget - trials.spent(self.steps[0])
        payable = left - self._reserved(len(full))
        narrow = self.until is not None and band is not None and band < self.until
        ran = [trial.rank for trial in search.counted()]
        believed = narrow and all(ran.count(rank) >= _FEWEST for rank in self.ranks)
        tasks = [task for task in self.tasks if self._cost(task) <= payable]
        if len(search) < self.total and not believed and tasks:
            return self._search(search, tasks)
        if len(full) < self.full_trials and left >= self.steps[-1]:
            longest = next((task for task in self.tasks if task.steps == self.steps[-1]), self.tasks[0])
            return Cell(None, self._seed(full), *longest)
        return None

    def _seed(self, few: Sequence[TrialRecord]) -> int:
        return self.seeds[(len(few) // PER_SEED) % len(self.seeds)]

    def _search(self, search: Trials, tasks: Sequence[Task]) -> Cell:
        """Return the highest rank until its rates are bracketed, then the ranks in turn at the task that is due."""
        mine = {task: Trials(t for t in search if t.place[1:] == task) for task in self.tasks}
        first = self.tasks[0]
        seen = mine[first].observations()
        most = _MOST_BRACKET if seen and all_rose(below_cliff(seen)) else _BRACKET
        if first in tasks and len(mine[first]) < min(most, self._searches() - len(self.ranks) + 1):
            return self._rotate(mine[first], first, [self.anchor])
        task = self._due(mine, tasks)
        return self._rotate(mine[task], task, self.ranks)

    def _due(self, mine: Mapping[Task, Trials], tasks: Sequence[Task]) -> Task:
        """Return the first task until all ranks had a few runs of it, then the task with the fewest steps so far.

        If only the length varies, the shortest runs only find the rates. Batches are all measured. See
        benchmarks/results/planned.md for the comparison with other plans.
        """
        first = self.tasks[0]
        if first in tasks and len(mine[first]) < self._needed:
            return first
        due = tasks if len(self.batches) > 1 else [task for task in tasks if task != first]
        return min(due or tasks, key=lambda task: (len(mine[task]) + 1) * self._cost(task))

    def _rotate(self, tried: Trials, task: Task, ranks: Sequence[int | None]) -> Cell:
        """Return the rank with the fewest trials. Each has four runs at a seed before the next seed.

        A diverged run has little information, so it counts less than the others. A pruned run counts in full.
        """
        seen = [(t.cell, t.observation) for t in tried if t.observation is not None and t.state.is_finished()]
        bad = diverged([observation for _, observation in seen])
        lost = [cell for (cell, _), b in zip(seen, bad, strict=True) if b]
        cells = [trial.cell for trial in tried]

        def due(cell: Cell) -> tuple[int, ...]:
            fruitful = cells.count(cell) - lost.count(cell)
            return fruitful // PER_SEED, self.seeds.index(cell.seed), fruitful, cells.count(cell)

        return min((Cell(rank, seed, *task) for rank in ranks for seed in self.seeds), key=due)
