"""Adapters of libraries that no test environment has, or that only copied code shows: replicas in plain torch.

Written from the attributes and shapes that the libraries document, to hold a row of the table against something that
computes and trains; they are not the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from .models import Weight, adapted
from .real_adapters import DENSE, IN, OUT, Case


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4)


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class Replica(nn.Module):
    """A frozen base, the factors and attributes given, and a forward that adds `moved(self, x)`."""

    def __init__(self, base, moved, **members):
        super().__init__()
        self.frozen, self.moved = base.requires_grad_(False), moved
        for name, value in members.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.frozen(x) + self.moved(self, x)


class Batched(nn.Module):
    """One frozen matrix for each of three experts."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = drawn(3, fan_in, fan_out)

    def forward(self, x):
        return torch.bmm(x, self.weight)


def onetrainer(rank, alpha):
    def moved(m, x):
        return m.lora_up(m.lora_down(x)) * m.alpha / m.rank

    down, up = nn.Linear(IN, rank, bias=False), Weighted(zeros(OUT, rank))
    return Replica(
        nn.Linear(IN, OUT),
        moved,
        lora_down=down,
        lora_up=up,
        rank=rank,
        alpha=torch.tensor(float(alpha)),
    )


def onetrainer_conv(rank, alpha):
    def moved(m, x):
        return m.lora_up(m.lora_down(x)) * m.alpha / m.rank

    down, up = nn.Conv2d(4, rank, 3, bias=False), nn.Conv2d(rank, 8, 1, bias=False)
    nn.init.zeros_(up.weight)
    return Replica(
        nn.Conv2d(4, 8, 3),
        moved,
        lora_down=down,
        lora_up=up,
        rank=rank,
        alpha=torch.tensor(float(alpha)),
    )


class Weighted(Weight):
    """A bias-free linear layer of this weight."""

    def forward(self, x):
        return functional.linear(x, self.weight)


def megatron(rank, alpha):
    def moved(m, x):
        return m.linear_out(m.linear_in(x)) * m.alpha / m.dim

    first, second = nn.Linear(IN, rank, bias=False), Weighted(zeros(OUT, rank))
    return Replica(
        nn.Linear(IN, OUT),
        moved,
        linear_in=first,
        linear_out=second,
        dim=rank,
        alpha=alpha,
    )


def megatron_experts(rank, alpha):
    def moved(m, x):
        return (
            m.alpha
            / m.dim
            * x
            @ m.linear_in.weight.transpose(1, 2)
            @ m.linear_out.weight.transpose(1, 2)
        )

    first, second = Weight(drawn(3, rank, IN)), Weight(zeros(3, OUT, rank))
    return Replica(
        Batched(IN, OUT),
        moved,
        linear_in=first,
        linear_out=second,
        dim=rank,
        alpha=alpha,
    )


def automodel(rank, alpha):
    def moved(m, x):
        return m.lora_B(m.lora_A(x) * m.scale)

    first, second = nn.Linear(IN, rank, bias=False), Weighted(zeros(OUT, rank))
    return Replica(
        nn.Linear(IN, OUT),
        moved,
        lora_A=first,
        lora_B=second,
        dim=rank,
        scale=alpha / rank,
    )


def automodel_experts(part):
    def make(rank, alpha):
        def moved(m, x):
            return (
                m.scale
                * x
                @ getattr(m, f"lora_{part}_A")
                @ getattr(m, f"lora_{part}_B")
            )

        pair = {
            f"lora_{part}_A": drawn(3, IN, rank),
            f"lora_{part}_B": zeros(3, rank, OUT),
        }
        return Replica(
            Batched(IN, OUT), moved, lora_dim=rank, scale=alpha / rank, **pair
        )

    return make


def deepspeed_chat(rank, alpha):
    def moved(m, x):
        return x @ m.lora_right_weight @ m.lora_left_weight * m.lora_scaling

    pair = {"lora_right_weight": drawn(IN, rank), "lora_left_weight": zeros(rank, OUT)}
    return Replica(nn.Linear(IN, OUT), moved, lora_scaling=alpha / rank, **pair)


def deepspeed_linear(rank, alpha):
    """DeepSpeed's LoRAOptimizedLinear, which also has an environment of its own."""
    pair = {
        "lora_weight_1": nn.Linear(IN, rank, bias=False),
        "lora_weight_2": nn.Linear(rank, OUT, bias=False),
    }
    nn.init.zeros_(pair["lora_weight_2"].weight)
    return Replica(
        nn.Linear(IN, OUT),
        lambda m, x: m.lora_scaling_factor * m.lora_weight_2(m.lora_weight_1(x)),
        lora_config=SimpleNamespace(lora_r=rank),
        lora_scaling_factor=alpha / rank,
        **pair,
    )


class Parametrization(nn.Module):
    """minLoRA's: W + scaling · B · A, or both transposed for a weight stored (in, out)."""

    def __init__(self, rank, alpha, swapped):
        super().__init__()
        shapes = ((IN, rank), (rank, OUT)) if swapped else ((rank, IN), (OUT, rank))
        self.lora_A, self.lora_B = drawn(*shapes[0]), zeros(*shapes[1])
        self.rank, self.lora_alpha, self.scaling, self.swapped = (
            rank,
            alpha,
            alpha / rank,
            swapped,
        )
        self.register_buffer("lora_dropout_mask", torch.ones(1, IN))

    def forward(self, weight):
        moved = self.lora_A @ self.lora_B if self.swapped else self.lora_B @ self.lora_A
        return weight + moved * self.scaling


class Transposed(nn.Module):
    """A linear layer whose weight is stored (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = drawn(IN, OUT)

    def forward(self, x):
        return x @ self.weight


def minlora(swapped):
    def make(rank, alpha):
        base = (Transposed() if swapped else nn.Linear(IN, OUT)).requires_grad_(False)
        parametrize.register_parametrization(
            base, "weight", Parametrization(rank, alpha, swapped)
        )
        return base

    return make


def cloneofsimo(rank, alpha):
    """`scale` is the multiplier itself."""

    def moved(m, x):
        return m.lora_up(m.lora_down(x)) * m.scale

    down, up = nn.Linear(IN, rank, bias=False), Weighted(zeros(OUT, rank))
    return Replica(
        nn.Linear(IN, OUT), moved, lora_down=down, lora_up=up, r=rank, scale=alpha
    )


def direct(rank, alpha):
    return alpha


x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))
stacks = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1))
images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def written(
    name: str, convention: str, make: Callable[[int, float], nn.Module], inputs=x, **own
) -> Case:
    """The case of a replica: of one pair, whose fans follow from its kind."""
    fans = ((36, 8),) if own.get("kind") == "conv" else DENSE
    return Case(name, "row only", convention, make, lambda: (inputs,), fans, **own)


_experts = {"inputs": stacks, "kind": "experts"}
REPLICAS = [
    written(
        "kohya LoRAModule",
        "lora_down/lora_up",
        lambda r, alpha: adapted("kohya", rank=r, scaling=alpha / r),
    ),
    written("OneTrainer", "lora_down/lora_up", onetrainer),
    written(
        "OneTrainer, Conv2d", "lora_down/lora_up", onetrainer_conv, images, kind="conv"
    ),
    written("cloneofsimo", "lora_down/lora_up", cloneofsimo, scaling=direct),
    written("Megatron", "megatron", megatron),
    written("Megatron, grouped experts", "megatron", megatron_experts, **_experts),
    written("Automodel", "automodel", automodel),
    written(
        "Automodel, up experts",
        "automodel-gate_and_up",
        automodel_experts("gate_and_up"),
        **_experts,
    ),
    written(
        "Automodel, down experts",
        "automodel-down",
        automodel_experts("down"),
        **_experts,
    ),
    written("DeepSpeed-Chat", "deepspeed-chat", deepspeed_chat),
    written("DeepSpeed's linear layer", "deepspeed-linear", deepspeed_linear),
    written("minLoRA", "minLoRA", minlora(False)),
    written("minLoRA, swapped", "minLoRA", minlora(True)),
]
