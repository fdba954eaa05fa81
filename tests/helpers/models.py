"""Small models with LoRA pairs, stored the way several libraries store them, and a training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional


class Weight(nn.Module):
    """A module that owns nothing but a `weight`, as a bias-free linear or convolution does."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapted(nn.Module):
    """A frozen layer plus scaling · B · A. Subclasses say in `put` and `pair` how A and B are
    stored.
    """

    def __init__(
        self, base: nn.Module, rank: int, scaling: float = 1.0, init: str = "A"
    ) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.put(*_draw(base, rank, init), rank, scaling)

    def put(self, a: torch.Tensor, b: torch.Tensor, rank: int, scaling: float) -> None:
        raise NotImplementedError

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    held: float | None = None

    @property
    def multiplier(self) -> float:
        """The number by which B · A is multiplied: the declared scaling, unless `held` sets another
        number.
        """
        return self.scaling if self.held is None else self.held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.pair()
        if isinstance(self.base_layer, nn.Embedding):
            low = functional.linear(functional.embedding(x, a.T), b)
        elif isinstance(self.base_layer, nn.Conv2d):
            low = functional.conv2d(
                functional.conv2d(x, a, padding=self.base_layer.padding), b
            )
        else:
            low = functional.linear(functional.linear(x, a), b)
        return self.base_layer(x) + self.multiplier * low


class PlainLoRA(Adapted):
    """A layer with two parameters `lora_A` and `lora_B`, and with `r` and `scaling`, as in loralib."""

    def put(self, a: torch.Tensor, b: torch.Tensor, rank: int, scaling: float) -> None:
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.r, self.scaling = rank, scaling

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A, self.lora_B


class TuneLoRA(Adapted):
    """A layer with submodules `lora_a` and `lora_b`, and with `rank` and `alpha`, as in torchtune."""

    def put(self, a: torch.Tensor, b: torch.Tensor, rank: int, scaling: float) -> None:
        self.lora_a, self.lora_b = Weight(a), Weight(b)
        self.rank, self.alpha = rank, scaling * rank

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_a.weight, self.lora_b.weight

    @property
    def multiplier(self) -> float:
        return self.alpha / self.rank


class KohyaLoRA(Adapted):
    """A layer with submodules `lora_down` and `lora_up`, with `lora_dim`, `scale` and a buffer
    `alpha`, as in kohya's scripts.
    """

    def put(self, a: torch.Tensor, b: torch.Tensor, rank: int, scaling: float) -> None:
        self.lora_down, self.lora_up = Weight(a), Weight(b)
        self.lora_dim, self.scale = rank, scaling
        self.register_buffer("alpha", torch.tensor(scaling * rank))

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_down.weight, self.lora_up.weight

    @property
    def multiplier(self) -> float:
        return self.scale


class ContainerLoRA(Adapted):
    """A layer that keeps A, B, `r` and `scaling` in dicts by adapter name, as in PEFT."""

    def put(self, a: torch.Tensor, b: torch.Tensor, rank: int, scaling: float) -> None:
        self.r, self.scaling = {"default": rank}, {"default": scaling}
        if isinstance(self.base_layer, nn.Embedding):
            self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(a)})
            self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(b)})
        else:
            self.lora_A, self.lora_B = (
                nn.ModuleDict({"default": Weight(a)}),
                nn.ModuleDict({"default": Weight(b)}),
            )

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.base_layer, nn.Embedding):
            return self.lora_embedding_A["default"], self.lora_embedding_B["default"]
        return self.lora_A["default"].weight, self.lora_B["default"].weight

    @property
    def multiplier(self) -> float:
        return self.scaling["default"]


STYLES = {
    "plain": PlainLoRA,
    "tune": TuneLoRA,
    "kohya": KohyaLoRA,
    "container": ContainerLoRA,
}
BASES = {
    "linear": lambda **options: nn.Linear(12, 20, **options),
    "conv": lambda **options: nn.Conv2d(3, 8, 3, padding=1, **options),
    "embedding": lambda **options: nn.Embedding(30, 8, **options),
}


def adapted(
    style: str = "plain",
    kind: str = "linear",
    *,
    rank: int = 4,
    scaling: float = 2.0,
    init: str = "A",
    **options,
) -> Adapted:
    """Return one adapted layer of this style and kind. `options`, such as dtype and device, are
    passed to its base layer.
    """
    return STYLES[style](BASES[kind](**options), rank, scaling, init)


def mlp(
    ranks: tuple[int, ...] = (4, 4),
    *,
    scalings: float | tuple[float, ...] = 1.0,
    init: str = "A",
    width: int = 16,
    style: str = "plain",
    head: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Sequential:
    """Return a model of adapted square linear layers, one for each rank, with a trainable head
    unless head=False.
    """
    torch.manual_seed(seed)
    each = scalings if isinstance(scalings, tuple) else (scalings,) * len(ranks)
    model = nn.Sequential()
    for i, (rank, scaling) in enumerate(zip(ranks, each, strict=True)):
        base = nn.Linear(width, width, dtype=dtype)
        model.add_module(f"layer{i}", STYLES[style](base, rank, scaling, init))
        model.add_module(f"act{i}", nn.Tanh())
    if head:
        model.add_module("head", nn.Linear(width, 3, dtype=dtype))
    return model


def batches(
    steps: int, *, width: int = 16, dtype: torch.dtype = torch.float32
) -> Iterator[torch.Tensor]:
    """Yield the same random inputs at every call."""
    source = torch.Generator().manual_seed(7)
    for _ in range(steps):
        yield torch.randn(8, width, generator=source, dtype=dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5
) -> list[torch.Tensor]:
    """Train on a made-up task, and return the outputs of every step."""
    dtype = next(model.parameters()).dtype
    outputs = []
    for x in batches(steps, dtype=dtype):
        out = model(x)
        (out - x[:, : out.shape[1]].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(out.detach())
    return outputs


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that train."""
    return [param for param in model.parameters() if param.requires_grad]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all parameters and buffers, by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two snapshots agree bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def _draw(base: nn.Module, rank: int, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B for `base`: the matrix that `init` names is drawn and the other is zero, or
    both are drawn if init is "other".
    """
    weight = base.weight.detach()
    if isinstance(base, nn.Embedding):
        weight = weight.T
    inner, rest = weight.shape[1:], [1] * (weight.dim() - 2)
    a = torch.randn_like(weight.new_empty(rank, *inner)) / math.sqrt(math.prod(inner))
    b = torch.randn_like(weight.new_empty(len(weight), rank, *rest)) / math.sqrt(rank)
    if init == "A":
        b.zero_()
    if init == "B":
        a.zero_()
    return a, b
