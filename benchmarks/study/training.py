"""One training run of a domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import partial
from itertools import islice
from typing import Any

import torch
from study.domains import Domain
from torch import nn

# warm-up as a share of the steps, final rate as a share of the rate
WARMUP, FINAL = (
    0.05,
    0.1,
)


def shape(step: int, steps: int, warmup: float = WARMUP) -> float:
    """Factor on the rate at a step: linear warm-up over a share of the steps, then a cosine to a tenth."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return (
        FINAL
        + (1 - FINAL)
        * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        / 2
    )


def trained(
    domain: Domain,
    model: nn.Module,
    opt: Any,
    seed: int,
    share: Callable[[int], float],
    clip: float = 1.0,
) -> Generator[float, None, float]:
    """Train, yield the training loss of every step, and return the held-out loss.

    `share` is the schedule: the factor on the rate by step. A schedule-free optimizer ignores it and warms up itself.
    """
    free = hasattr(opt, "train")
    schedule = None if free else torch.optim.lr_scheduler.LambdaLR(opt, share)
    if free:
        opt.train()
    clipped = [p for p in model.parameters() if p.requires_grad]
    for batch in islice(domain.batches(seed, domain.batch), domain.steps):
        opt.zero_grad()
        loss = domain.loss(model, batch)
        loss.backward()
        if clip < math.inf:
            nn.utils.clip_grad_norm_(clipped, clip)
        opt.step()
        if schedule is not None:
            schedule.step()
        yield loss.item()
    if free:
        opt.eval()
    return domain.evaluate(model)


def train(
    domain: Domain,
    model: nn.Module,
    opt: Any,
    seed: int,
    clip: float = math.inf,
    warmup: float = WARMUP,
) -> float | None:
    """The held-out loss after the domain's steps. A run that diverges ends at once and returns None."""
    run = trained(
        domain,
        model,
        opt,
        seed,
        partial(shape, steps=domain.steps, warmup=warmup),
        clip,
    )
    while True:
        try:
            loss = next(run)
        except StopIteration as end:
            return end.value if math.isfinite(end.value) else None
        if not math.isfinite(loss):
            return None
