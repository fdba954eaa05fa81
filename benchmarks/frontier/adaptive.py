"""Optimizers that find their own rate, or need no schedule, run as their authors say.

Each trains all adapters at one rate of its own. Parameters beside them have the study's fixed rates, by AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from study.configurations import ADAMW, CLIP
from study.domains import Domain
from study.training import WARMUP, shape
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Adaptive:
    """An optimizer with its settings.

    Args:
        build: (parameters, steps of the run, the setting that varies) -> the optimizer.
        varies: the setting on which people disagree.
        settings: in words.
        advised_by: who says so.
        clip: the norm at which gradients are clipped.
        warmup: as a share of the steps.
    """

    build: Callable[[Sequence[Tensor], int, float], Optimizer]
    varies: str
    settings: str
    advised_by: str
    clip: float = math.inf
    warmup: float = WARMUP


def prodigy(
    params: Sequence[Tensor], steps: int, d_coef: float, **options: bool
) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params, lr=1.0, d_coef=d_coef, **options, **ADAMW)


def from_d0(params: Sequence[Tensor], steps: int, d0: float) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params, lr=1.0, d0=d0, **ADAMW)


def d_adaptation(params: Sequence[Tensor], steps: int, scale: float) -> Optimizer:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(params, lr=scale, decouple=True, **ADAMW)


def schedule_free(params: Sequence[Tensor], steps: int, lr: float) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    warm = max(1, round(WARMUP * steps))
    return AdamWScheduleFree(params, lr=lr, warmup_steps=warm, **ADAMW)


PRODIGY, SAFEGUARDED = "Prodigy", "Prodigy with safeguard"
FROM_D0 = "Prodigy from a larger `d0`"
D_ADAPTATION, SCHEDULE_FREE = "D-Adaptation", "schedule-free AdamW"
ADAPTIVE = {
    PRODIGY: Adaptive(
        prodigy,
        "d_coef",
        "lr 1, decay .01, cosine without warm-up, no clipping; `d_coef` .5, 1 and 2",
        "its README (prodigyopt 1.1.2)",
        warmup=0.0,
    ),
    FROM_D0: Adaptive(
        from_d0,
        "d0",
        "the same with `d_coef` 1; `d0` 1e-5 and 1e-4 for 1e-6",
        "its README, for a model that does not train",
        warmup=0.0,
    ),
    SAFEGUARDED: Adaptive(
        partial(prodigy, safeguard_warmup=True, use_bias_correction=True),
        "d_coef",
        "warm-up of 5 %, its safeguard, and bias correction; `d_coef` 1 and 2",
        "its README, for warm-up and for diffusion models",
    ),
    D_ADAPTATION: Adaptive(
        d_adaptation,
        "lr",
        "Adam, lr 1, decoupled decay of .01, schedule and clipping as one would have them",
        "its README (dadaptation 3.2)",
        CLIP,
    ),
    SCHEDULE_FREE: Adaptive(
        schedule_free,
        "rate of",
        "no schedule, warm-up of 5 %, clipping at 1; the rate suggested for AdamW, and for itself",
        "its README (schedulefree 1.4.1)",
        CLIP,
    ),
}


def optimizer(
    way: str, model: nn.Module, domain: Domain, steps: int, setting: float
) -> Optimizer:
    """An optimizer of the adapters, or of all weights. After its step AdamW steps the heads, at their rates."""
    params, heads = parted(model, domain)
    opt = ADAPTIVE[way].build(params, steps, setting)
    if heads:
        with_heads(opt, heads, steps)
    return opt


def parted(
    model: nn.Module, domain: Domain
) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """What trains at the rate that is sought, and groups of what has a fixed rate."""
    params, heads = [], []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        rates = domain.head_rates.items()
        fixed = [lr for pattern, lr in rates if fnmatchcase(name, pattern)]
        if fixed:
            heads.append({"params": [param], "lr": fixed[0]})
        else:
            params.append(param)
    return params, heads


def with_heads(opt: Optimizer, heads: list[dict[str, Any]], steps: int) -> None:
    beside = torch.optim.AdamW(heads, **ADAMW)
    schedule = LambdaLR(beside, partial(shape, steps=steps))

    def step(*_: Any) -> None:
        beside.step()
        beside.zero_grad()
        schedule.step()

    opt.register_step_post_hook(step)
