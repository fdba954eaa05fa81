"""AdamW written out in float64, at rates written out: what the optimizers on the device are compared with."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rankaware_optim import RankAwareOptimizer, Reference

from ...helpers.models import batches, mlp
from ...helpers.optimizers import multiplier

DEVICE = os.environ.get("RANKAWARE_DEVICE", "cuda")
# bitsandbytes keeps tensors of fewer than 4,096 entries in 32 bits
WIDTH, RANKS = 1024, (4, 32)
LR, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.99), 1e-8
STEPS = 4
AT_16 = Reference(rank=16, alpha=16)

needs_device = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="There is no CUDA device here. RANKAWARE_DEVICE=cpu runs what a CPU can.",
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="There is no CUDA device here."
)


def new_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two adapted layers of ranks 4 and 32, and a head."""
    return mlp(RANKS, width=WIDTH, seed=3).to(DEVICE, dtype)


def inputs(steps: int = STEPS) -> Iterator[torch.Tensor]:
    yield from (x.to(DEVICE) for x in batches(steps, width=WIDTH))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x).float() - x[:, :3].float().sin()).square().mean()


def ours(
    model: nn.Module, kind: Any = torch.optim.AdamW, lr: Any = LR, **settings: Any
) -> Any:
    own = {"weight_decay": DECAY, "betas": BETAS, "eps": EPS, **settings}
    return RankAwareOptimizer(model, kind, lr=lr, tuned_at=AT_16, **own)


def rates(lr: float = LR) -> dict[str, float]:
    """The rate of every trained parameter: a factor's as the law moves it from rank 16, the base rate for the head."""
    found = {}
    for i, rank in enumerate(RANKS):
        moved = lr * multiplier(rank, width=WIDTH)
        found |= {f"layer{i}.lora_A": moved, f"layer{i}.lora_B": moved}
    assert len(set(found.values())) == len(RANKS)
    return found | {"head.weight": lr, "head.bias": lr}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trained parameter in float64 on the CPU."""
    named = model.named_parameters()
    return {name: whole(p.detach()) for name, p in named if p.requires_grad}


def gradients(model: nn.Module, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The same of gradients, divided by the scale that they carry."""
    named = [(name, p.grad) for name, p in model.named_parameters()]
    return {name: whole(grad) / scale for name, grad in named if grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of a tensor sharded over one process its one shard is all."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().cpu().double().clone()


class ByHand:
    """AdamW's update from gradients alone: it holds the parameters that the device should hold."""

    def __init__(self, model: nn.Module) -> None:
        self.params = values(model)
        self.first = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = 0

    def step(self, grads: dict[str, torch.Tensor], lr: float = LR) -> None:
        self.steps += 1
        for name, rate in rates(lr).items():
            g, m, v = grads[name], self.first[name], self.second[name]
            m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
            v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g * g)
            corrected = m / (1 - BETAS[0] ** self.steps)
            root = v.sqrt() / math.sqrt(1 - BETAS[1] ** self.steps) + EPS
            self.params[name] = (
                self.params[name] * (1 - rate * DECAY) - rate * corrected / root
            )

    def agrees(self, model: nn.Module, within: float = 1e-3) -> None:
        """Every parameter is what it should be: within a share of its own rate, and float32's rounding."""
        for name, rate in rates().items():
            is_, should = values(model)[name], self.params[name]
            near = {"rtol": 1e-6, "atol": within * rate, "msg": name}
            torch.testing.assert_close(is_, should, **near)
