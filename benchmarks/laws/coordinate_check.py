"""Whether features move equally far at every rank, by a few steps of a real optimizer on one LoRA layer.

The layer stands alone, without its frozen weight. Inputs x (n_in, tokens) and output gradients g (n_out, tokens) are
drawn once and held fixed. The gradients are dL/dA = s·Bᵀ·g·xᵀ and dL/dB = s·g·(A·x)ᵀ. The output moves by s·B·A·x, since
B·A = 0 at the start. Weight decay is left out, because a few large steps would exaggerate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import linear_regression
from typing import Any

import torch
from internals import known_optimizer
from torch import nn
from torch.optim import Optimizer

from rankaware_optim import Factor, Law, Reference

RANGE = 60.0  # octaves: rates from 2^-60 to 2^60 are searched
PRECISION = 2.0**-10  # octaves of the rate


@dataclass(frozen=True)
class CoordinateCheck:
    """An optimizer's class and settings, and the law that gives the rates of a layer."""

    optimizer: Callable[..., Optimizer]
    law: Law
    settings: Mapping[str, Any] = field(default_factory=dict)
    width: int = 64
    tokens: int = 512
    steps: int = 4
    seed: int = 0

    def slope(
        self, ranks: Sequence[int], scaling: Callable[[int], float], init: str
    ) -> float:
        """The slope of log2 of the output's change against log2 of the rank: 0 if the law's rates are right.

        The base rate is that at which the output moves by an rms of 1 at the first rank.
        """
        first = ranks[0]
        at = Reference(first, scaling(first) * first, init=init, fan_in=self.width)
        factors = [
            Factor("", "A", r, self.width, self.width, scaling(r), init) for r in ranks
        ]
        lr = self.base_rate(factors[0], at)
        changes = [math.log2(self.change(factor, at, lr)) for factor in factors]
        return linear_regression([math.log2(r) for r in ranks], changes).slope

    def base_rate(self, factor: Factor, at: Reference) -> float:
        """The rate at which the output moves by an rms of 1, by bisection. An overflow counts as too high a rate."""
        low, high = -RANGE, RANGE
        while high - low > PRECISION:
            middle = (low + high) / 2
            if self.change(factor, at, 2.0**middle) <= 1.0:  # False for nan
                low = middle
            else:
                high = middle
        change = self.change(factor, at, 2.0**low)
        if not 0.9 < change < 1.1:  # rounding in the optimizer makes small jumps
            raise ValueError(f"at no rate does the output move by 1: {change:.3g}")
        return 2.0**low

    def change(self, factor: Factor, at: Reference, lr: float) -> float:
        """The rms of s·B·A·x after the steps."""
        s = factor.scaling
        x, g = self._tokens(self.seed), self._tokens(self.seed + 1)
        a, b = self._pair(factor)
        rates = [self.law.multiplier(replace(factor, role=role), at) for role in "AB"]
        groups = [
            {"params": [p], "lr": lr * rate}
            for p, rate in zip((a, b), rates, strict=True)
        ]
        with torch.random.fork_rng(devices=()):  # for optimizers that draw numbers
            torch.default_generator.manual_seed(self.seed)
            opt = self._built(groups)
            for _ in range(self.steps):
                a.grad = s * (b.detach().T @ g) @ x.T
                b.grad = s * g @ (a.detach() @ x).T
                opt.step()
        return float((s * b.detach() @ (a.detach() @ x)).square().mean().sqrt())

    def _tokens(self, seed: int) -> torch.Tensor:
        """Tokens of rms 1, (features, tokens)."""
        source = torch.Generator().manual_seed(seed)
        tokens = torch.randn(self.width, self.tokens, generator=source)
        return tokens / tokens.square().mean(dim=0).sqrt()

    def _pair(self, factor: Factor) -> tuple[nn.Parameter, nn.Parameter]:
        """A pair: A of variance 1/n_in with B = 0, or B of variance 1/r with A = 0."""
        rank = factor.rank or 1
        a, b = torch.zeros(rank, self.width), torch.zeros(self.width, rank)
        drawn, variance = (b, 1 / rank) if factor.init == "B" else (a, 1 / self.width)
        source = torch.Generator().manual_seed(self.seed + 2)
        drawn.normal_(std=math.sqrt(variance), generator=source)
        return nn.Parameter(a), nn.Parameter(b)

    def _built(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer over two groups, without weight decay."""
        opt: Any = self.optimizer(groups, lr=groups[0]["lr"], **self.settings)
        if hasattr(opt, "train"):  # schedule-free optimizers step in training mode only
            opt.train()
        switches = known_optimizer(type(opt))[1].switches
        if all(switch.setting != "weight_decay" for switch in switches):
            for group in opt.param_groups:  # LARS is another optimizer without it
                group["weight_decay"] = 0.0
        return opt
