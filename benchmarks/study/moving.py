"""How rates move between ranks or configurations, in octaves: by a law, and in simple ways without one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from study.configurations import CONFIGS, TUNED, built, tuned_at
from study.domains import DomainError, get_domain
from study.grids import FULL

from rankaware_optim import Falling, Law, Reference, Survey, inspect_model
from rankaware_optim.laws import at_distance, checked_multiplier
from rankaware_optim.optimizer import PlanOptions, make_plan

INITS = ("Init[A], s = 1", "Init[B], s = 1")
# octaves from a source rank to a target rank; `FULL` is full finetuning
Shift = Callable[[int, int], float]


def kept(a: int, b: int) -> float:
    """One rate everywhere."""
    return 0.0


def by_inverse_rank(domain: str) -> Shift:
    """The rate falls as 1/r. Full finetuning counts as r = n, the model's width."""
    return lambda a, b: (
        -math.log2((b or surveyed(domain, next(iter(CONFIGS)), TUNED).width) / a)
    )


def by_law(domain: str, config: str, law: Law) -> Shift:
    return lambda a, b: (
        octaves(domain, config, b, law) - octaves(domain, config, a, law)
    )


def by_default(domain: str, config: str) -> Shift:
    """As the package moves a rate by default: by the default law, at its distance."""
    law = Falling()
    shift = by_law(domain, config, law)
    return lambda a, b: math.log2(at_distance(law, 2.0 ** shift(a, b)))


def across_inits(domain: str, rank: int, law: Law) -> float:
    """Octaves by which a law moves a rate from Init[A] to Init[B]."""
    here = Reference(rank, rank, fan_in=surveyed(domain, INITS[0], rank).width)
    return math.log2(checked_multiplier(law, replace(here, init="B").as_factor(), here))


@cache
def octaves(domain: str, config: str, rank: int, law: Law) -> float:
    """log2 of a law's multiplier for a rate tuned at rank 16 in the same configuration, without any distance.

    Args:
        domain: the domain's name.
        config: the configuration.
        rank: the rank to move to; `FULL` is full finetuning.
        law: the law that moves the rate. It must give A and B the same rate.
    """
    survey, heads = surveyed(domain, config, rank), get_domain(domain).head_rates
    plan = make_plan(
        survey,
        PlanOptions(law, tuned_at=tuned_at(config), rates=heads),
        torch.optim.AdamW,
    )
    moved = [
        factor
        for factor in survey.factors
        if plan.assign(factor.name, factor).pinned_lr is None
    ]
    found = [math.log2(plan.multiplier(factor)) for factor in moved]
    if max(found) - min(found) > 1e-9:
        raise DomainError(
            f"{law} gives A and B different rates.",
            "The sweeps are of one rate: compare laws of one.",
        )
    return found[0]


@cache
def surveyed(domain: str, config: str, rank: int) -> Survey:
    """Survey of what is trained at a rank. It is cached, so that the model is built once for all laws."""
    method: Literal["lora", "full"] = "full" if rank == FULL else "lora"
    return inspect_model(built(get_domain(domain), config, rank, 0), method=method)
