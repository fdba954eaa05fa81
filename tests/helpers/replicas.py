"""Replicas in plain torch of adapters whose libraries no test environment has, or that exist only as copied code.

They are written from the attributes and shapes that the libraries document. So a row of the table of conventions can
be tested against a module that computes and trains.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .models import Weight
from .real_adapters import DENSE, IN, OUT, Case, per_rank

Make = Callable[[int, float], nn.Module]
Declared = Callable[[int, float], dict[str, Any]]
EXPERTS = (3,)


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4)


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def direct(rank, alpha):
    return alpha


class Replica(nn.Module):
    """A frozen base layer with a LoRA pair beside it. `by` is the scaling, and `moved` names A and B."""

    def __init__(self, base, by, moved, members):
        super().__init__()
        self.frozen, self.by, self.moved = base.requires_grad_(False), by, moved
        for name, value in members.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        factors = [getattr(self, name) for name in self.moved]
        if isinstance(factors[0], nn.Module):
            factors = [factor.weight.mT for factor in factors]
        return self.frozen(x) + self.by * (x @ factors[0] @ factors[1])


class Columns(nn.Module):
    """A layer whose weight is stored as (in, out), or as a stack of such matrices."""

    def __init__(self, *stack):
        super().__init__()
        self.weight = drawn(*stack, IN, OUT)

    def forward(self, x):
        return x @ self.weight


def of_modules(*names: str, declares: Declared, by=per_rank, stack=()) -> Make:
    """Return a builder with A and B as modules of these names, with weights (rank, in) and (out, rank)."""

    def make(rank, alpha):
        pair = Weight(drawn(*stack, rank, IN)), Weight(zeros(*stack, OUT, rank))
        members = dict(zip(names, pair, strict=True)) | declares(rank, alpha)
        return Replica(Columns(*stack), by(rank, alpha), names, members)

    return make


def of_parameters(*names: str, declares: Declared, stack=()) -> Make:
    """Return a builder with A and B as parameters of these names, stored (in, rank) and (rank, out)."""

    def make(rank, alpha):
        pair = drawn(*stack, IN, rank), zeros(*stack, rank, OUT)
        members = dict(zip(names, pair, strict=True)) | declares(rank, alpha)
        return Replica(Columns(*stack), per_rank(rank, alpha), names, members)

    return make


class Parametrization(nn.Module):
    """minLoRA's parametrization: W + scaling · B · A, or both matrices transposed for a weight that
    is stored as (in, out).
    """

    def __init__(self, rank, alpha, swapped):
        super().__init__()
        shapes = ((IN, rank), (rank, OUT)) if swapped else ((rank, IN), (OUT, rank))
        self.lora_A, self.lora_B = drawn(*shapes[0]), zeros(*shapes[1])
        self.rank, self.lora_alpha, self.scaling = rank, alpha, alpha / rank
        self.swapped = swapped
        self.register_buffer("lora_dropout_mask", torch.ones(1, IN))

    def forward(self, weight):
        moved = self.lora_A @ self.lora_B if self.swapped else self.lora_B @ self.lora_A
        return weight + moved * self.scaling


def minlora(swapped):
    def make(rank, alpha):
        base = Columns() if swapped else nn.Linear(IN, OUT)
        parametrize.register_parametrization(
            base.requires_grad_(False), "weight", Parametrization(rank, alpha, swapped)
        )
        return base

    return make


onetrainer = of_modules(
    *("lora_down", "lora_up"),
    declares=lambda rank, alpha: {"rank": rank, "alpha": torch.tensor(float(alpha))},
)
cloneofsimo = of_modules(  # `scale` is the multiplier itself
    *("lora_down", "lora_up"),
    declares=lambda rank, alpha: {"r": rank, "scale": alpha},
    by=direct,
)
_megatron = {
    "declares": lambda rank, alpha: {"dim": rank, "alpha": alpha},
}
megatron = of_modules("linear_in", "linear_out", **_megatron)
megatron_experts = of_modules("linear_in", "linear_out", **_megatron, stack=EXPERTS)
automodel = of_modules(
    *("lora_A", "lora_B"),
    declares=lambda rank, alpha: {"dim": rank, "scale": alpha / rank},
)
deepspeed_linear = of_modules(
    *("lora_weight_1", "lora_weight_2"),
    declares=lambda rank, alpha: {
        "lora_config": SimpleNamespace(lora_r=rank),
        "lora_scaling_factor": alpha / rank,
    },
)
deepspeed_chat = of_parameters(
    *("lora_right_weight", "lora_left_weight"),
    declares=lambda rank, alpha: {"lora_scaling": alpha / rank},
)


def automodel_experts(part: str) -> Make:
    return of_parameters(
        *(f"lora_{part}_A", f"lora_{part}_B"),
        declares=lambda rank, alpha: {"lora_dim": rank, "scale": alpha / rank},
        stack=EXPERTS,
    )


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


x, stacks, images = seeded(5, IN), seeded(3, 5, IN), seeded(2, 4, 6, 6)


def written(name: str, convention: str, make: Make, inputs=x, **own) -> Case:
    """Return the test case of a replica."""
    return Case(name, "row only", convention, make, lambda: (inputs,), DENSE, **own)


_experts = {"inputs": stacks, "kind": "experts"}
_down, _up = "automodel-down", "automodel-gate_and_up"
REPLICAS = [
    written("OneTrainer", "lora_down/lora_up", onetrainer),
    written("cloneofsimo", "lora_down/lora_up", cloneofsimo, scaling=direct),
    written("Megatron", "megatron", megatron),
    written("Megatron, grouped experts", "megatron", megatron_experts, **_experts),
    written("Automodel", "automodel", automodel),
    written("Automodel, up experts", _up, automodel_experts("gate_and_up"), **_experts),
    written("Automodel, down experts", _down, automodel_experts("down"), **_experts),
    written("DeepSpeed-Chat", "deepspeed-chat", deepspeed_chat),
    written("DeepSpeed's linear layer", "deepspeed-linear", deepspeed_linear),
    written("minLoRA", "minLoRA", minlora(False)),
    written("minLoRA, swapped", "minLoRA", minlora(True)),
]
