"""What is tried next, and when it is enough: ranks, lengths and seeds in turn, a budget in steps, a narrow band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .._types import Method
from ..recipe import Place
from ._trials import Cell, TrialRecord, Trials
from .fit import below_cliff, diverged

_TRIALS_PER_RANK = 8
_FEWEST = 2  # finished trials of every rank before a narrow band is believed
_HOPELESS = 12  # runs that all diverged, each two octaves lower, after which none will help
_SHORT_RUNS = 10  # with a budget alone: trials at most, in units of those that it would pay in full
# Runs of the highest rank before any other, since losses of different ranks say little of each other's rates; and at
# most, where none of them ended well. Then runs of every other rank at the shortest length, before any longer one.
_BRACKET, _MOST_BRACKET, _SHORT = 3, 8, 2
PER_SEED = 4  # runs of a rank at one seed before the next: only those are compared without the seed's noise
CONFIRMS = 3  # runs at the target's length at most, with a budget for half of it at most


class Task(NamedTuple):
    """The steps and the batch of a run; None where the study has one of them."""

    steps: int | None = None
    batch: float | None = None


@dataclass(frozen=True)
class Schedule:
    """How a calibration spends its steps: `trials` to search, then `full_trials` in full, then those that confirm.

    steps: the lengths of trials, rising. budget: training steps in all, never exceeded. until: octaves; the search ends
    when the 90 % band is narrower. target_steps, batch: of the run that is meant; 0 is the longest of `steps`.
    confirm: end with runs at `target_steps`.
    """

    ranks: tuple[int | None, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    trials: int | None = None
    budget: int | None = None
    until: float | None = None
    full_trials: int = 0
    target: Method = "lora"
    target_steps: int = 0
    batches: tuple[float, ...] = ()
    batch: float | None = None
    confirm: bool = False

    @property
    def tasks(self) -> list[Task]:
        """What is searched at: first the shortest length at the batch nearest to the target's, then others of each."""
        lengths = self.steps if len(self.steps) > 1 or self.target_steps not in (0, *self.steps) else (None,)
        apart = {batch: abs(math.log2(batch / (self.batch or 1.0))) for batch in self.batches}
        batches: list[float | None] = [*sorted(apart, key=apart.__getitem__)] or [None]
        longer = [Task(steps, batches[0]) for steps in lengths[1:]]
        return [Task(lengths[0], batches[0]), *longer, *(Task(lengths[0], batch) for batch in batches[1:])]

    @property
    def anchor(self) -> int | None:
        """The rank at which rates are bracketed, and carried to other lengths and batches: the highest."""
        return max((rank for rank in self.ranks if rank is not None), default=None)

    @property
    def total(self) -> int:
        """Trials of the search at most."""
        if self.trials is not None:
            return self.trials
        if self.budget is not None:
            return max(_TRIALS_PER_RANK, _SHORT_RUNS * self.budget // self.steps[0])
        return _TRIALS_PER_RANK * len(self.ranks) * len(self.tasks)

    @property
    def confirms(self) -> int:
        """Runs at the target's length."""
        if not self.confirm:
            return 0
        return CONFIRMS if self.budget is None else max(1, min(CONFIRMS, self.budget // (2 * self.target_steps)))

    def kind(self, place: Place) -> Literal["search", "full", "confirm"]:
        """What a run is for."""
        if self.confirms and place.steps == self.target_steps:
            return "confirm"
        return "full" if self.full_trials and place.rank is None else "search"

    def expected(self) -> int:
        """Trials that are likely, for whoever waits."""
        return self._searches() + self.full_trials + self.confirms

    def _searches(self) -> int:
        """Trials of the search that are likely: what is left of the budget is shared among the tasks."""
        if self.budget is None:
            return self.total
        left = self.budget - self._reserved(0, 0)
        return min(self.total, sum(left // (len(self.tasks) * self._cost(task)) for task in self.tasks))

    def _cost(self, task: Task) -> int:
        """Training steps."""
        return task.steps or self.steps[0]

    def _reserved(self, full: int, confirmed: int) -> int:
        """Training steps that the runs after the search need, where so many of them have begun."""
        return (self.full_trials - full) * self.steps[-1] + (self.confirms - confirmed) * self.target_steps

    def least(self) -> int:
        """Training steps without which the plan cannot be carried out."""
        return self.steps[0] + self._reserved(0, 0)

    def next(
        self, trials: Trials, band: float | None = None, weights: Mapping[int | None, float] | None = None
    ) -> Cell | None:
        """What to try next, or None if it is enough.

        band: octaves of the 90 % band so far. weights: the share of trials that each rank deserves.
        """
        done = trials.counted()
        if len(done) >= _HOPELESS and all(diverged(done.observations())):
            return None
        tried = (*done, *trials.running())
        of = {kind: Trials(t for t in tried if self.kind(t.place) == kind) for kind in ("search", "full", "confirm")}
        search, full, confirmed = of.values()
        left = math.inf if self.budget is None else self.budget - trials.spent(self.steps[0])
        payable = left - self._reserved(len(full), len(confirmed))
        narrow = self.until is not None and band is not None and band < self.until
        ran = [trial.rank for trial in search.counted()]
        believed = narrow and all(ran.count(rank) >= _FEWEST for rank in self.ranks)
        tasks = [task for task in self.tasks if self._cost(task) <= payable]
        if len(search) < self.total and not believed and tasks:
            return self._search(search, tasks, weights or {})
        if len(full) < self.full_trials and left >= self.steps[-1]:
            longest = next((task for task in self.tasks if task.steps == self.steps[-1]), self.tasks[0])
            return Cell(None, self._seed(full), *longest)
        if len(confirmed) < self.confirms and left >= self.target_steps:
            rank = None if self.target == "full" else self.anchor
            return Cell(rank, self._seed(confirmed), self.target_steps, self.tasks[0].batch)
        return None

    def _seed(self, few: Sequence[TrialRecord]) -> int:
        return self.seeds[(len(few) // PER_SEED) % len(self.seeds)]

    def _search(self, search: Trials, tasks: Sequence[Task], weights: Mapping[int | None, float]) -> Cell:
        """The highest rank first, until its rates are bracketed; then the ranks in turn at the task that is due."""
        mine = {task: Trials(t for t in search if t.place[1:] == task) for task in self.tasks}
        first = self.tasks[0]
        seen = mine[first].observations()
        most = _BRACKET if below_cliff(seen) or not seen else _MOST_BRACKET
        if first in tasks and len(mine[first]) < min(most, self._searches() - len(self.ranks) + 1):
            return self._rotate(mine[first], first, [self.anchor], weights)
        task = self._due(mine, tasks)
        return self._rotate(mine[task], task, self.ranks, weights)

    def _due(self, mine: Mapping[Task, Trials], tasks: Sequence[Task]) -> Task:
        """The shortest length until all ranks had a few runs of it, then the other task of the fewest steps.

        A longer run costs more and says more of the target: see benchmarks/results/planned.md.
        """
        first = self.tasks[0]
        others = [task for task in tasks if task != first]
        if first in tasks and (not others or len(mine[first]) < _BRACKET + _SHORT * (len(self.ranks) - 1)):
            return first
        return min(others or tasks, key=lambda task: (len(mine[task]) + 1) * self._cost(task))

    def _rotate(
        self, tried: Trials, task: Task, ranks: Sequence[int | None], weights: Mapping[int | None, float]
    ) -> Cell:
        """Ranks in turn, the one tried least for its weight, four runs of each at a seed before the next seed.

        A run that diverged says little, so it does not count before the others; one that the pruner stopped was judged.
        """
        seen = [(t.cell, t.observation) for t in tried if t.observation is not None and t.state.is_finished()]
        bad = diverged([observation for _, observation in seen])
        lost = [cell for (cell, _), b in zip(seen, bad, strict=True) if b]
        cells = [trial.cell for trial in tried]

        def due(cell: Cell) -> tuple[float, ...]:
            weight = weights.get(cell.rank, 1.0)
            fruitful = (cells.count(cell) - lost.count(cell)) / weight
            return fruitful // PER_SEED, self.seeds.index(cell.seed), fruitful, cells.count(cell) / weight

        return min((Cell(rank, seed, *task) for rank in ranks for seed in self.seeds), key=due)


def leverage(ranks: Sequence[int | None], width: float) -> dict[int | None, float]:
    """How much each rank's optimum counts in the line continued to r = n, over log2 of the rank; at least 0.2.

    The line through (r1, v1) and (r2, v2) gives v(n) = (1 + ρ)·v2 − ρ·v1 with ρ = log(n/r2) / log(r2/r1). Its
    variance is least when trials are shared as the two coefficients are.

    >>> {rank: round(share, 2) for rank, share in leverage((4, 64), 576.0).items()}
    {4: 0.79, 64: 1.79}
    """
    lora = sorted(r for r in ranks if r is not None)
    shares: dict[int | None, float] = dict.fromkeys(ranks, 0.2)
    if len(lora) > 1:
        beyond = max(0.0, math.log(width / lora[-1]) / math.log(lora[-1] / lora[0]))
        shares |= {lora[0]: max(0.2, beyond), lora[-1]: 1.0 + beyond}
    return shares
