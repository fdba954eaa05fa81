"""A run that costs nothing: a LoRA pair, and noisy made-up losses that are best at the rate 2^-7."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Pair(nn.Module):
    """A LoRA pair on a frozen 8 × 8 weight."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, 8))
        self.lora_B = nn.Parameter(torch.zeros(8, rank))
        self.r, self.scaling = rank, 1.0


def train(trial: Any, pause: float = 0.0) -> Iterator[float]:
    """Yield a trial's losses, one a step; each step takes `pause` seconds."""
    trial.optimizer(Pair(trial.rank))
    u = math.log2(trial.lr) + 7
    for step in range(trial.steps):
        time.sleep(pause)
        yield 2.3 - step * 0.2 / (1 + u * u) + 0.01 * torch.rand(1).item()
