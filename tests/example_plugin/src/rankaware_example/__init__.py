"""An example law, and an example adapter layer with the convention by which it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rankaware_optim import Convention, Factor, Law, Reference

__all__ = ["BOTTLENECK", "Bottleneck", "StableProduct"]


@dataclass(frozen=True)
class StableProduct(Law):
    """A law that keeps lr · (scaling · rank)^power constant. A whole weight's rank is its fan-in."""

    power: float = 0.5
    name: ClassVar[str] = "example-product"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        there = reference.scaling * (reference.rank or reference.fan_in or 1.0)
        return (there / (factor.scaling * (factor.rank or factor.fan_in))) ** self.power


class Bottleneck(nn.Module):
    """A frozen linear layer plus gain · x · reduce · expand: a LoRA pair stored as (in, rank) and (rank, out)."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out).requires_grad_(False)
        self.reduce = nn.Parameter(torch.randn(fan_in, rank) / fan_in**0.5)
        self.expand = nn.Parameter(torch.zeros(rank, fan_out))
        self.width, self.gain = rank, alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.gain * (x @ self.reduce @ self.expand)


BOTTLENECK = Convention(
    "example-bottleneck",
    a="reduce",
    b="expand",
    layouts=("columns",),
    rank=("width",),
    scaling=("gain",),
)
