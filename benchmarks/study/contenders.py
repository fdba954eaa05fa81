"""Ways to pick a rate for every rank and for full finetuning without a calibration; recipes are compared with these.

Each uses only the sweep that a user who tunes once has: nine rates at one rank of one configuration, one seed. It
returns log2 of its rate by rank, with `FULL` for full finetuning. None of them sees the seeds that score it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from study.configurations import LORAPLUS, TUNED
from study.domains import Domain
from study.grids import FULL, Losses, curve, lowest
from study.moving import Shift, by_inverse_rank, by_law, kept

from rankaware_optim import MuA

Rates = dict[int, float]


@dataclass(frozen=True)
class Known:
    """What a user knows after one sweep: the domain, the configuration, its ranks, and the losses of all runs."""

    domain: Domain
    config: str
    ranks: tuple[int, ...]
    done: Losses

    def best(self, scheme: str, rank: int) -> float:
        """log2 of the best rate in a sweep on one seed."""
        return lowest(curve(self.done, (self.domain.name, scheme, rank), 1))

    def moved(self, shift: Shift, added: str = "") -> Rates:
        """log2 rate by rank: the best at rank `TUNED`, moved by `shift`. `added` is appended to the scheme's name."""
        x = self.best(self.config + added, TUNED)
        return {rank: x + shift(TUNED, rank) for rank in (*self.ranks, FULL)}


def ten_times_full(known: Known) -> Rates:
    x = known.best("full", FULL)
    return {**dict.fromkeys(known.ranks, x + math.log2(10)), FULL: x}


CONTENDERS: Mapping[str, Callable[[Known], Rates]] = {
    "one rate everywhere": lambda known: known.moved(kept),
    "1/r": lambda known: known.moved(by_inverse_rank(known.domain.name)),
    # A's rate; full finetuning has no B and keeps it
    "LoRA+ 16": lambda known: known.moved(kept, LORAPLUS),
    "ten times full": ten_times_full,
    "the paper's law": lambda known: known.moved(
        by_law(known.domain.name, known.config, MuA(tokens=None))
    ),
    "µA at 8 tokens": lambda known: known.moved(
        by_law(known.domain.name, known.config, MuA(tokens=8.0))
    ),
}
