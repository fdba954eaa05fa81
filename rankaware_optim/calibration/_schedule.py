"""What is tried next, and when it is enough: ranks and seeds in turn, a budget in steps, a band narrow enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .._types import Method
from ._trials import Cell, Trials
from .fit import diverged

_TRIALS_PER_RANK = 8
_FEWEST = 2  # finished trials of every rank before a narrow band is believed
_HOPELESS = 12  # runs that all diverged, each two octaves lower, after which none will help
_SHORT_RUNS = 10  # with a budget alone: trials at most, in units of those that it would pay in full
PER_SEED = 4  # runs of a rank at one seed before the next: only those are compared without the seed's noise


@dataclass(frozen=True)
class Schedule:
    """How a calibration spends its steps: `trials` at `ranks` and `seeds` in turn, then `full_trials` in full.

    budget: training steps in all, never exceeded. until: octaves; LoRA trials end when the 90 % band is narrower.
    """

    ranks: tuple[int | None, ...]
    seeds: tuple[int, ...]
    steps: int
    trials: int | None = None
    budget: int | None = None
    until: float | None = None
    full_trials: int = 0
    target: Method = "lora"

    @property
    def total(self) -> int:
        """Trials at most, beside those of full finetuning that were asked for."""
        if self.trials is not None:
            return self.trials
        if self.budget is not None:
            return max(_TRIALS_PER_RANK, _SHORT_RUNS * self.budget // self.steps)
        return _TRIALS_PER_RANK * len(self.ranks)

    def expected(self) -> int:
        """Trials that are likely, for whoever waits."""
        paid = math.inf if self.budget is None else self.budget // self.steps
        return int(min(self.total + self.full_trials, paid))

    def next(
        self, trials: Trials, band: float | None = None, weights: Mapping[int | None, float] | None = None
    ) -> Cell | None:
        """The rank and seed to try next, or None if it is enough.

        band: octaves of the 90 % band so far. weights: the share of trials that each rank deserves.
        """
        done = trials.counted()
        if len(done) >= _HOPELESS and all(diverged(done.observations())):
            return None
        tried = (*done, *trials.running())
        full = [t for t in tried if self.full_trials and t.rank is None]
        lora = Trials(t for t in tried if not self.full_trials or t.rank is not None)
        payable = math.inf if self.budget is None else (self.budget - trials.spent(self.steps)) // self.steps
        narrow = self.until is not None and band is not None and band < self.until
        ran = [trial.rank for trial in lora.counted()]
        believed = narrow and all(ran.count(rank) >= _FEWEST for rank in self.ranks)
        if len(lora) < self.total and not believed and payable > self.full_trials - len(full):
            return self._rotate(lora, weights or {})
        if len(full) < self.full_trials and payable >= 1:
            return Cell(None, self.seeds[(len(full) // PER_SEED) % len(self.seeds)])
        return None

    def _rotate(self, lora: Trials, weights: Mapping[int | None, float]) -> Cell:
        """Ranks in turn, the one tried least for its weight, four runs of each at a seed before the next seed.

        A run that diverged says little, so it does not count before the others; one that the pruner stopped was judged.
        """
        seen = [(t.cell, t.observation) for t in lora if t.observation is not None and t.state.is_finished()]
        bad = diverged([observation for _, observation in seen])
        lost = [cell for (cell, _), b in zip(seen, bad, strict=True) if b]
        tried = [trial.cell for trial in lora]

        def due(cell: Cell) -> tuple[float, ...]:
            weight = weights.get(cell.rank, 1.0)
            fruitful = (tried.count(cell) - lost.count(cell)) / weight
            return fruitful // PER_SEED, self.seeds.index(cell.seed), fruitful, tried.count(cell) / weight

        return min((Cell(rank, seed) for rank in self.ranks for seed in self.seeds), key=due)


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
