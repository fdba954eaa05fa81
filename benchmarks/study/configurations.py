"""LoRA configurations that the studies share, and one run of a configuration at a rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from study.domains import Domain, get_domain
from study.grids import FULL, Job, Listed, Losses, or_inf
from study.training import train
from torch import nn
from torch.optim import Optimizer

import rankaware_optim as ra

ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01}
CLIP, TUNED = 1.0, 16
LORAPLUS = ", LoRA+ 16"  # added to a configuration's name


@dataclass(frozen=True)
class Config:
    """A LoRA configuration: its init, and the exponent gamma of its effective multiplier s = r^-gamma."""

    init: Literal["A", "B"]
    gamma: float

    def alpha(self, rank: int) -> float:
        """alpha such that alpha / rank is the effective multiplier."""
        return float(rank ** (1.0 - self.gamma))


CONFIGS = {
    "Init[A], s = 1": Config("A", 0.0),
    "Init[A], s = 1/r": Config("A", 1.0),
    "Init[B], s = 1": Config("B", 0.0),
}
RSLORA = {"Init[A], s = r^-1/2": Config("A", 0.5)}


def config_of(scheme: str) -> str:
    """Name of the configuration with which a scheme's name begins, or "full"."""
    begun = [name for name in {**CONFIGS, **RSLORA} if scheme.startswith(name)]
    return max(begun, key=len, default="full")  # one name may begin with another


def built(domain: Domain, config: str, rank: int, seed: int) -> nn.Module:
    """The domain's model in a configuration; at rank `FULL`, for full finetuning."""
    if rank == FULL:
        return domain.build(None, 1.0, "A", seed)
    chosen = {**CONFIGS, **RSLORA}[config]
    return domain.build(rank, chosen.alpha(rank), chosen.init, seed)


START = "before training"  # a scheme without steps


def run_at(job: Job) -> float | None:
    """The held-out loss of a job's run at rate 2^x: AdamW, gradients clipped at norm 1, heads at fixed rates."""
    return run_in(get_domain(job.domain), job)


def run_in(domain: Domain, job: Job) -> float | None:
    """The same as `run_at`, in a given domain instead of the one that the job names."""
    model = built(domain, config_of(job.scheme), job.rank, job.seed)
    if job.scheme == START:
        return domain.evaluate(model)
    return train(domain, model, optimizer(model, domain, job), job.seed, CLIP)


def starts(domain: str, seeds: Sequence[int]) -> Listed:
    """Jobs for the loss before training, one for each seed, since a new head is drawn by the seed."""
    return Listed([Job(domain, START, FULL, 0.0, seed) for seed in seeds])


def start_of(domain: str, done: Losses) -> float:
    """Mean loss before training over the runs on file."""
    return statistics.fmean(
        or_inf(loss) for job, loss in done.items() if job[:2] == (domain, START)
    )


def optimizer(model: nn.Module, domain: Domain, job: Job) -> Optimizer:
    """The optimizer of a job: AdamW with rate 2^x for both A and B, unless the scheme's name says otherwise.

    LoRA+ has 16 times the rate for B.
    """
    method = "full" if job.rank == FULL else "lora"
    law = ra.LoRAPlus(16.0) if job.scheme.endswith(LORAPLUS) else "constant"
    rates = domain.head_rates
    return ra.RankAwareOptimizer(
        model, "adamw", lr=2.0**job.x, rates=rates, method=method, law=law, **ADAMW
    )


def reference_at(config: str, rank: int) -> ra.Reference:
    """The configuration at a rank."""
    chosen = {**CONFIGS, **RSLORA}[config]
    return ra.Reference(rank, chosen.alpha(rank), init=chosen.init)


def tuned_at(config: str) -> ra.Reference:
    """The configuration at rank `TUNED`, where a user who tunes once tunes."""
    return reference_at(config, TUNED)
