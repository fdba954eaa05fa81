"""What a recipe is compared with: ways to pick a rate for every rank and for full finetuning, without a calibration.

Each takes what one configuration's sweeps gave a user who tuned once (nine rates, one seed), and names log2 of its
rate at every rank, `FULL` for full finetuning. None of them sees the seeds that score it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from study.domains import Domain, DomainError, get_domain
from study.domains._configs import CONFIGS, LORAPLUS, TUNED, built, tuned_at
from study.domains._runs import FULL, Losses, curve

from rankaware_optim import Law, MuA, Survey, inspect_model
from rankaware_optim.optimizer import PlanOptions, make_plan

Rates = dict[int, float]


@dataclass(frozen=True)
class Known:
    """What a user has who swept one rank once: the domain, the configuration, its ranks and every run on file."""

    domain: Domain
    config: str
    ranks: tuple[int, ...]
    done: Losses

    def best(self, scheme: str, rank: int) -> float:
        """log2 of the best rate of a sweep on one seed."""
        means = curve(self.done, (self.domain.name, scheme, rank), 1)
        return min(means, key=lambda x: means[x])


def one_rate(known: Known) -> Rates:
    x = known.best(known.config, TUNED)
    return dict.fromkeys((*known.ranks, FULL), x)


def inverse_rank(known: Known) -> Rates:
    """The rate falls as 1/r; full finetuning stands at r = n."""
    x, width = known.best(known.config, TUNED), width_of(known.domain)
    return {rank: x - math.log2((rank or width) / TUNED) for rank in (*known.ranks, FULL)}


def loraplus(known: Known) -> Rates:
    """B at 16 times A's rate, A's kept at every rank; full finetuning has no B and keeps A's."""
    x = known.best(known.config + LORAPLUS, TUNED)
    return dict.fromkeys((*known.ranks, FULL), x)


def ten_times_full(known: Known) -> Rates:
    x = known.best("full", FULL)
    return {**dict.fromkeys(known.ranks, x + math.log2(10)), FULL: x}


def by_law(law: Law) -> Callable[[Known], Rates]:
    """The rate tuned at rank 16, moved by a law to every rank and to full finetuning."""

    def moved(known: Known) -> Rates:
        x = known.best(known.config, TUNED)
        return {rank: x + octaves(known.domain, known.config, rank, law) for rank in (*known.ranks, FULL)}

    return moved


CONTENDERS: Mapping[str, Callable[[Known], Rates]] = {
    "one rate everywhere": one_rate,
    "1/r": inverse_rank,
    "LoRA+ 16": loraplus,
    "ten times full": ten_times_full,
    "the paper's law": by_law(MuA(tokens=None)),
    "µA at 8 tokens": by_law(MuA()),
}


def octaves(domain: Domain, config: str, rank: int, law: Law, origin: str | None = None) -> float:
    """log2 of the multiplier that the package gives at a rank, or to full finetuning, to a rate tuned at rank 16.

    Tuned in the same configuration, or in `origin`.
    """
    survey, at = surveyed(domain.name, config, rank), tuned_at(origin or config)
    options = PlanOptions(law, tuned_at=at, rates=domain.head_rates, across_inits=origin is not None)
    plan = make_plan(survey, options, optimizer_class=torch.optim.AdamW)
    told = [plan.assign(factor.name, factor) for factor in survey.factors]
    multipliers = [each.multiplier for each in told if each.rate is None]
    if max(multipliers) > min(multipliers) * (1 + 1e-9):
        raise DomainError(f"{law} gives A and B different rates.", "The sweeps are of one rate: compare laws of one.")
    return math.log2(multipliers[0])


@cache
def surveyed(domain: str, config: str, rank: int) -> Survey:
    """What is trained at a rank; the model is built once for all laws."""
    method: Literal["lora", "full"] = "full" if rank == FULL else "lora"
    return inspect_model(built(get_domain(domain), config, rank, 0), method=method)


def width_of(domain: Domain) -> float:
    """The fan-in that stands for the model's width."""
    return float(surveyed(domain.name, next(iter(CONFIGS)), TUNED).width)
