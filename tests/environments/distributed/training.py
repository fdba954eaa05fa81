"""Code of both processes: a small model, half of every batch for each, and the native optimizer
with groups by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from rankaware_optim import RankAwareOptimizer, Reference
from rankaware_optim.inspection import canonical_name

from ...helpers.models import batches, mlp, trained
from ...helpers.optimizers import multiplier
from .worker import WORLD

LR = 1e-2
AT_16 = Reference(rank=16, alpha=16)
# two processes share rank 3 unevenly, and of rank 1 one process holds nothing
RANKS = (4, 8, 3, 1)
WIDTH = 16

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
}


def new_model() -> nn.Sequential:
    return mlp(RANKS, width=WIDTH, seed=3)


def by_class(
    model: nn.Module, kind: str = "AdamW", params: Any = None, **own: Any
) -> Any:
    native, settings = KINDS[kind]
    own |= {"model": model, "tuned_at": AT_16, **settings}
    return RankAwareOptimizer(params or trained(model), native, lr=LR, **own)


def by_instance(
    model: nn.Module, kind: str = "AdamW", params: Any = None, **own: Any
) -> Any:
    native, settings = KINDS[kind]
    built = native(params or trained(model), lr=LR, **settings)
    return RankAwareOptimizer(built, model=model, tuned_at=AT_16, **own)


def by_hand(model: nn.Module, kind: str = "AdamW") -> torch.optim.Optimizer:
    """Return the native class with a group for A and B of every rank, at the learning rates of the
    scaling law, and one for the head.
    """
    native, settings = KINDS[kind]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for i, rank in enumerate(RANKS):
        rate = LR * multiplier(rank, native, settings)
        own = [p for name, p in named if f"layer{i}." in name]
        groups += [{"params": [p], "lr": rate} for p in own]
    groups += [{"params": [p for name, p in named if "head" in name], "lr": LR}]
    return native(groups, **settings)


FORMS: dict[str, Callable[..., Any]] = {"class": by_class, "instance": by_instance}


# --- a task ---------------------------------------------------------------------------------------------------------


def train(model: nn.Module, opt: Any, first: int = 0, last: int = 4) -> None:
    """Train from step `first` to step `last` of one task, on this process's half of every batch."""
    for x in list(batches(last, width=WIDTH))[first:]:
        loss(model, half(x)).backward()
        opt.step()
        opt.zero_grad()


def half(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(WORLD)[dist.get_rank()]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return (out - x[:, : out.shape[1]].sin()).square().mean()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters by their names in the unwrapped model.

    They are whole, except under FSDP1, where each process returns its share.
    """
    return {
        canonical_name(name): whole(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def tagged(opt: Any) -> dict[str, tuple[float, int | None]]:
    """Return the learning rate and the declared rank of every parameter, by name."""
    rates = inner(opt).rates
    return {name: (rate.lr, rate.rank) for name, rate in rates.items()}


def lrs(opt: Any) -> list[float]:
    """Return the learning rates that an optimizer trains at, for our optimizer and for native ones."""
    opt = inner(opt)
    if isinstance(opt, RankAwareOptimizer):
        return sorted({group.lr for group in opt.rates.groups})
    return sorted({group["lr"] for group in opt.param_groups})


def inner(opt: Any) -> Any:
    """Return the optimizer inside a framework's wrappers."""
    while hasattr(opt, "optimizer"):
        opt = opt.optimizer
    return opt


def expected_tags(kind: str = "AdamW") -> dict[str, tuple[float, int | None]]:
    tags: dict[str, tuple[float, int | None]] = {}
    for i, rank in enumerate(RANKS):
        rate = LR * multiplier(rank, *KINDS[kind])
        tags |= {f"layer{i}.lora_{half}": (rate, rank) for half in "AB"}
    return {**tags, "head.weight": (LR, None), "head.bias": (LR, None)}
