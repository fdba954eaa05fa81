"""The order of trials and the stopping rules: ranks and seeds in turn, a budget of steps, a narrow
band.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..fitting import all_rose, below_cliff, diverged
from ._trials import Cell, TrialRecord, Trials

_TRIALS_PER_RANK = 8
_FEWEST = 2  # finished trials of every rank before a narrow band stops the search
_SHORT_RUNS = 10  # with a budget only: most trials, as a multiple of the whole runs that it allows
# Runs of the highest rank before any other rank, since losses of different ranks cannot be
# compared; the most such runs if all of them rise; and runs of every other rank without which its
# rate is not found.
_BRACKET, _MOST_BRACKET, _OF_OTHERS = 3, 8, 2
PER_SEED = 4  # runs of a rank at one seed before the next seed; runs of one seed share its noise


@dataclass(frozen=True)
class Schedule:
    """The plan of a calibration: `trials` of the search, then `full_trials` of full finetuning.

    The fields are the arguments of `calibrate`.
    """

    ranks: tuple[int | None, ...]
    seeds: tuple[int, ...]
    steps: int
    trials: int | None = None
    budget: int | None = None
    until: float | None = None
    full_trials: int = 0

    @property
    def anchor(self) -> int | None:
        """The highest rank, at which rates are bracketed."""
        return max((rank for rank in self.ranks if rank is not None), default=None)

    @property
    def total(self) -> int:
        """The largest number of trials of the search."""
        if self.trials is not None:
            return self.trials
        if self.budget is not None:
            return max(_TRIALS_PER_RANK, _SHORT_RUNS * self.budget // self.steps)
        return _TRIALS_PER_RANK * len(self.ranks)

    def expected(self) -> int:
        """Return the likely number of trials, for progress reports."""
        return self._searches() + self.full_trials

    def _searches(self) -> int:
        """Return the likely number of trials of the search."""
        if self.budget is None:
            return self.total
        return min(self.total, self.budget // self.steps - self.full_trials)

    def caution(self) -> str:
        """Return a warning if a budget pays for too few runs to find the rates of all ranks, else
        "".
        """
        runs, needed = self._searches(), _BRACKET + _OF_OTHERS * (len(self.ranks) - 1)
        if self.budget is None or runs >= min(needed, self.total):
            return ""
        return (
            f"A budget of {self.budget} steps leaves the search {runs} of the {needed} runs that it"
            " needs, so the rates may be far off. Give a larger budget, or fewer full trials."
        )

    def least(self) -> int:
        """Return the smallest number of training steps with which the plan is possible."""
        return self.steps * (1 + self.full_trials)

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
        left = math.inf if self.budget is None else self.budget - trials.spent(self.steps)
        payable = left - (self.full_trials - len(full)) * self.steps
        if len(search) < self.total and payable >= self.steps and not self._is_enough(search, band):
            return self._search(search)
        if len(full) < self.full_trials and left >= self.steps:
            return Cell(None, self.seeds[(len(full) // PER_SEED) % len(self.seeds)])
        return None

    def _is_enough(self, search: Trials, band: float | None) -> bool:
        """Return whether the band is narrow, and every rank had its fewest runs."""
        if self.until is None or band is None or band >= self.until:
            return False
        ran = [trial.rank for trial in search.counted()]
        return all(ran.count(rank) >= _FEWEST for rank in self.ranks)

    def _search(self, search: Trials) -> Cell:
        """Return the highest rank until its rates are bracketed, then the ranks in turn."""
        seen = search.observations()
        most = _MOST_BRACKET if seen and all_rose(below_cliff(seen)) else _BRACKET
        is_bracketing = len(search) < min(most, self._searches() - len(self.ranks) + 1)
        return self._rotate(search, [self.anchor] if is_bracketing else self.ranks)

    def _rotate(self, tried: Sequence[TrialRecord], ranks: Sequence[int | None]) -> Cell:
        """Return the rank with the fewest trials. Each has four runs at a seed before the next
        seed.

        A diverged run has little information, so it counts less than the others. A pruned run
        counts in full.
        """
        seen = [
            (t.cell, t.observation)
            for t in tried
            if t.observation is not None and t.state.is_finished()
        ]
        bad = diverged([observation for _, observation in seen])
        lost = [cell for (cell, _), b in zip(seen, bad, strict=True) if b]
        cells = [trial.cell for trial in tried]

        def due(cell: Cell) -> tuple[int, ...]:
            fruitful = cells.count(cell) - lost.count(cell)
            return fruitful // PER_SEED, self.seeds.index(cell.seed), fruitful, cells.count(cell)

        return min((Cell(rank, seed) for rank in ranks for seed in self.seeds), key=due)
