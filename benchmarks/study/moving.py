"""How rates move between ranks or configurations, in octaves: by a law, and in simple ways without one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from study.configurations import reference_at, tuned_at
from study.domains import DomainError, get_domain
from study.grids import FULL

from rankaware_optim import Law, Reference
from rankaware_optim.laws import checked_multiplier

INITS = ("Init[A], s = 1", "Init[B], s = 1")
# octaves from a source rank to a target rank; `FULL` is full finetuning
Shift = Callable[[int, int], float]


def kept(a: int, b: int) -> float:
    """One rate everywhere."""
    return 0.0


def by_inverse_rank(domain: str) -> Shift:
    """The rate falls as 1/r. Full finetuning counts as r = n, the model's width."""
    mean, _ = get_domain(domain).widths
    return lambda a, b: -math.log2((b or mean) / a)


def by_law(domain: str, config: str, law: Law) -> Shift:
    return lambda a, b: (
        octaves(domain, config, b, law) - octaves(domain, config, a, law)
    )


@cache
def octaves(domain: str, config: str, rank: int, law: Law) -> float:
    """log2 of a law's multiplier for a rate tuned at rank 16 in the same configuration.

    Args:
        domain: the domain's name.
        config: the configuration.
        rank: the rank to move to; `FULL` is full finetuning.
        law: the law that moves the rate. It must give A and B the same rate.
    """
    mean, largest = get_domain(domain).widths
    bound, origin = law.bind(torch.optim.AdamW, {}), tuned_at(config)
    if rank == FULL:
        width = mean if origin.init == "B" else largest
        roles = [Reference(method="full", fan_in=width).as_factor()]
    else:
        of_a = replace(reference_at(config, rank), fan_in=mean).as_factor()
        roles = [of_a, replace(of_a, role="B")]
    origin = replace(origin, fan_in=mean)
    found = [math.log2(checked_multiplier(bound, role, origin)) for role in roles]
    if max(found) - min(found) > 1e-9:
        raise DomainError(
            f"{law} gives A and B different rates.",
            "The sweeps are of one rate: compare laws of one.",
        )
    return found[0]
