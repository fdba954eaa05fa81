"""LoRA configurations that the studies share, and a run of one at a rate."""

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
LORAPLUS, TWO_RATES, PRODIGY = ", LoRA+ 16", ", two rates", ", Prodigy"  # added to a configuration's name


@dataclass(frozen=True)
class Config:
    """A LoRA configuration: its init, and gamma, by which the effective multiplier is s = r^-gamma."""

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
    """The configuration's name that a scheme's begins with, or "full"."""
    begun = [name for name in {**CONFIGS, **RSLORA} if scheme.startswith(name)]
    return max(begun, key=len, default="full")  # one name begins another's


def built(domain: Domain, config: str, rank: int, seed: int) -> nn.Module:
    """The domain's model in a configuration, or trained whole at rank `FULL`."""
    if rank == FULL:
        return domain.build(None, 1.0, "A", seed)
    chosen = {**CONFIGS, **RSLORA}[config]
    return domain.build(rank, chosen.alpha(rank), chosen.init, seed)


START = "before training"  # a scheme without steps


def run_at(job: Job, warmup: float) -> float | None:
    """The held-out loss of a run at 2^x: AdamW, clipped at 1, heads at rates of their own."""
    return run_in(get_domain(job.domain), job, warmup)


def run_in(domain: Domain, job: Job, warmup: float) -> float | None:
    """The same in a domain that may differ from the one named."""
    model = built(domain, config_of(job.scheme), job.rank, job.seed)
    if job.scheme == START:
        return domain.evaluate(model)
    return train(domain, model, optimizer(model, domain, job), job.seed, CLIP, warmup)


def starts(domain: str, seeds: Sequence[int]) -> Listed:
    """The losses before training: a new head is drawn by the seed."""
    return Listed([Job(domain, START, FULL, 0.0, seed) for seed in seeds])


def start_of(domain: str, done: Losses) -> float:
    """Mean loss before training, of the runs on file."""
    return statistics.fmean(or_inf(loss) for job, loss in done.items() if job[:2] == (domain, START))


def before_training(domain: Domain, seeds: int) -> float:
    """Mean loss before training, computed: where no run of `starts` is on file."""
    return statistics.fmean(domain.evaluate(built(domain, "full", FULL, seed)) for seed in range(seeds))


def optimizer(model: nn.Module, domain: Domain, job: Job) -> Optimizer:
    """AdamW at 2^x for A and B alike, or as the scheme's name says; Prodigy, unwrapped, finds one rate for all.

    Two rates are a base rate's at rank 16, moved from there by the law.
    """
    method = "full" if job.rank == FULL else "lora"
    if job.scheme.endswith(PRODIGY):
        from pytorch_optimizer import Prodigy

        return Prodigy([p for p in model.parameters() if p.requires_grad], lr=1.0, **ADAMW)
    own: dict[str, Any] = {"law": ra.LoRAPlus(16.0) if job.scheme.endswith(LORAPLUS) else "constant"}
    if job.scheme.endswith(TWO_RATES):
        own = {"law": ra.MuA(split=True), "tuned_at": tuned_at(config_of(job.scheme))}
    return ra.RankAwareOptimizer(model, "adamw", lr=2.0**job.x, rates=domain.head_rates, method=method, **own, **ADAMW)


def tuned_at(config: str) -> ra.Reference:
    """The configuration at the rank at which a user tunes who tunes once."""
    chosen = {**CONFIGS, **RSLORA}[config]
    return ra.Reference(TUNED, chosen.alpha(TUNED), init=chosen.init)
