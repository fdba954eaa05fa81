"""Whether features move equally far at every rank, by a few steps of a real optimizer.

Each layer stands alone, without its frozen weight. Inputs x (n_in, tokens) and output gradients g
(n_out, tokens) are drawn once and held fixed. The gradients are dL/dA = s·Bᵀ·g·xᵀ and dL/dB =
s·g·(A·x)ᵀ. The output moves by s·(B·A − B₀·A₀)·x, where B₀·A₀ = 0. Weight decay is left out,
because a few large steps would exaggerate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from statistics import linear_regression
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import nn
from torch.optim import Optimizer

from .._checks import check_init
from .._optimizers import get_optimizer_class, known_optimizer
from .._printing import Table
from .._types import Factor, Reference
from ..errors import LawError
from ..laws import Law, MuA, bound_law, checked_multiplier, get_law, law_title

_RANGE = 60.0  # octaves: rates from 2^-60 to 2^60 are searched
_PRECISION = 2.0**-10  # octaves of the rate


_Whole = Annotated[int, Meta(ge=1)]


class _Request(msgspec.Struct):
    """What `coordinate_check` can be asked."""

    shapes: Annotated[dict[str, tuple[_Whole, _Whole]], Meta(min_length=1)]
    ranks: Annotated[set[_Whole], Meta(min_length=2)]
    tokens: _Whole
    steps: _Whole


@dataclass(frozen=True)
class CoordinateRow:
    """How far the steps moved the output of one layer at one rank.

    Args:
        layer: the layer's name.
        fan_in: its number of inputs.
        fan_out: its number of outputs.
        rank: the LoRA rank.
        scaling: s, the factor of B·A.
        lr_a: A's rate, per step.
        lr_b: B's rate, per step.
        change: rms of the change of the output's entries.
    """

    layer: str
    fan_in: int
    fan_out: int
    rank: int
    scaling: float
    lr_a: float
    lr_b: float
    change: float


@dataclass(frozen=True)
class CoordinateCheck:
    """The result of `coordinate_check`.

    Args:
        rows: one entry per layer and rank.
        slopes: slope of log2 change against log2 rank, by layer.
        law: the law that gave the rates.
        optimizer: the optimizer's name.
        tolerance: the largest slope that counts as rank-invariant.
    """

    rows: tuple[CoordinateRow, ...]
    slopes: Mapping[str, float]
    law: Law
    optimizer: str
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every layer's slope is within the tolerance."""
        return all(abs(slope) <= self.tolerance for slope in self.slopes.values())

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        layer, worst = max(self.slopes.items(), key=lambda pair: abs(pair[1]))
        ranks = [row.rank for row in self.rows]
        verdict = "are rank-invariant" if self.ok else "are NOT rank-invariant"
        return (
            f"Feature updates {verdict} with {self.optimizer}, {law_title(self.law)}: over ranks"
            f" {min(ranks)} to {max(ranks)} the output's change goes as r^{worst:+.2f} in {layer},"
            f" the worst of {len(self.slopes)} (tolerance {self.tolerance})."
        )

    def __str__(self) -> str:
        heads = [f.name for f in fields(CoordinateRow)]
        cells = []
        for row in self.rows:
            layer, *numbers = astuple(row)
            cells.append([layer, *(f"{number:.3g}" for number in numbers)])
        return Table(heads, cells, [self.sentence], left=("layer",)).text(160)


def coordinate_check(
    shapes: Mapping[str, tuple[int, int]],
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int] = (4, 16, 64),
    law: Law | str | None = None,
    init: Literal["A", "B"] = "A",
    scaling: float | Callable[[int], float] = 1.0,
    tokens: int = 512,
    steps: int = 4,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    tolerance: float = 0.25,
) -> CoordinateCheck:
    """Check whether features move equally far at every rank, by a few steps of the real optimizer.
    They do if the law's rates are right. The base rate is that at which the output of the first
    layer moves by an rms of 1 at the first rank.

    Args:
        shapes: of weights, (n_out, n_in), by layer name.
        optimizer: a torch optimizer class or its name.
        ranks: the LoRA ranks to compare.
        law: the law that gives the rates, by default µA at the number of tokens.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        scaling: s, or a function of the rank that returns it.
        tokens: number of synthetic tokens.
        steps: number of optimizer steps.
        seed: random seed of factors and tokens.
        settings: the optimizer's settings other than lr.
        tolerance: the largest slope of log2 change against log2 rank that passes.

    Raises:
        LawError: an argument is impossible, the optimizer cannot be built or stepped, or no rate
            gives a finite change of the wanted size.
        OptimizerError: the optimizer is unknown.

    >>> check = coordinate_check({"q": (64, 64)}, "AdamW", ranks=(4, 16), tokens=64)
    >>> check.ok, len(check.rows)
    (True, 2)
    """
    try:
        asked = {
            "shapes": shapes,
            "ranks": set(ranks),
            "tokens": tokens,
            "steps": steps,
        }
        msgspec.convert(asked, _Request)
    except msgspec.ValidationError as error:
        raise LawError(
            f"This cannot be checked: {error}.",
            "Give shapes={name: (n_out, n_in)}, two or more ranks, and whole numbers.",
        ) from error
    check_init(init, "init is", LawError)
    kind, settings = get_optimizer_class(optimizer), settings or {}
    bound = bound_law(get_law(law or MuA(tokens=tokens)), kind, settings)
    scale = scaling if callable(scaling) else lambda rank: scaling
    scalings = {rank: float(scale(rank)) for rank in ranks}
    (_, first_in), *_ = shapes.values()
    at = Reference(ranks[0], scalings[ranks[0]] * ranks[0], init=init, fan_in=first_in)
    stepper = _Stepper(kind, settings, bound, at, steps, seed)
    rows: list[CoordinateRow] = []
    slopes: dict[str, float] = {}
    lr: float | None = None
    for name, (n_out, n_in) in shapes.items():
        x, g = _tokens(n_in, tokens, seed), _tokens(n_out, tokens, seed + 1)
        changes = []
        for rank, s in scalings.items():
            a = Factor("", "A", rank, n_in, n_out, s, init)
            lr = lr or stepper.rate(x, g, a)
            change = stepper.change(x, g, a, lr)
            if not 0 < change < math.inf:
                raise LawError(
                    f"The output of {name} moves by {change} at rank {rank} and rate {lr:.3g}.",
                    "Give ranks or a law at which the optimizer takes finite steps.",
                )
            changes.append(math.log2(change))
            lr_a, lr_b = stepper.rates(a, lr)
            rows.append(CoordinateRow(name, n_in, n_out, rank, s, lr_a, lr_b, change))
        slopes[name] = linear_regression(list(map(math.log2, ranks)), changes).slope
    return CoordinateCheck(tuple(rows), slopes, bound, kind.__name__, tolerance)


def _tokens(features: int, count: int, seed: int) -> torch.Tensor:
    """Draw tokens of rms 1, (features, count). The global generator is not used."""
    source = torch.Generator("cpu").manual_seed(seed)
    tokens = torch.randn(
        features, count, generator=source, dtype=torch.float32, device="cpu"
    )
    return tokens / tokens.square().mean(dim=0).sqrt()


@dataclass(frozen=True)
class _Stepper:
    """An optimizer's class, its settings other than lr, and the law that gives the rates."""

    optimizer: Callable[..., Optimizer]
    settings: Mapping[str, Any]
    law: Law
    reference: Reference
    steps: int
    seed: int

    def rates(self, a: Factor, lr: float) -> tuple[float, float]:
        """Return the rates of A and B for a base rate."""
        on_a = checked_multiplier(self.law, a, self.reference)
        on_b = checked_multiplier(self.law, replace(a, role="B"), self.reference)
        return lr * on_a, lr * on_b

    def rate(self, x: torch.Tensor, g: torch.Tensor, a: Factor) -> float:
        """Return the base rate at which the output moves by an rms of 1, by bisection. An overflow
        counts as too high a rate.
        """
        low, high = -_RANGE, _RANGE
        while high - low > _PRECISION:
            middle = (low + high) / 2
            if self.change(x, g, a, 2.0**middle) <= 1.0:  # False for nan
                low = middle
            else:
                high = middle
        rate = float(2.0**low)
        # rounding in the optimizer makes small jumps
        if not 0.9 < (change := self.change(x, g, a, rate)) < 1.1:
            raise LawError(
                f"The output moves by an rms of 1 at no rate: nearest was {change:.3g} at"
                f" {rate:.3g}.",
                "Check the optimizer's settings (a built-in rate, a cap, clipping), or choose"
                " another law.",
            )
        return rate

    def change(
        self, x: torch.Tensor, g: torch.Tensor, factor: Factor, lr: float
    ) -> float:
        """Return the rms of s·B·A·x after the steps: the whole change, since B₀·A₀ = 0."""
        s = factor.scaling
        a, b = self._pair(factor)
        lr_a, lr_b = self.rates(factor, lr)
        with torch.random.fork_rng(devices=()):  # for optimizers that draw numbers
            torch.default_generator.manual_seed(self.seed)
            try:
                opt = self._optimizer(
                    [{"params": [a], "lr": lr_a}, {"params": [b], "lr": lr_b}]
                )
                for _ in range(self.steps):
                    a.grad = s * (b.detach().T @ g) @ x.T
                    b.grad = s * g @ (a.detach() @ x).T
                    opt.step()
            except Exception as error:  # a third-party optimizer may raise anything
                raise LawError(
                    "The optimizer could not step LoRA factors with settings"
                    f" {dict(self.settings)!r}: {type(error).__name__}: {error}.",
                    "Give settings= that let it step two matrices without a closure, or choose"
                    " another law.",
                ) from error
        return float((s * b.detach() @ (a.detach() @ x)).square().mean().sqrt())

    def _pair(self, factor: Factor) -> tuple[nn.Parameter, nn.Parameter]:
        """Draw a pair: A of variance 1/n_in with B = 0, or B of variance 1/r with A = 0."""
        rank, n_in, n_out = factor.rank or 1, int(factor.fan_in), int(factor.fan_out)
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        a, b = torch.zeros(rank, n_in, **options), torch.zeros(n_out, rank, **options)
        random, variance = (b, 1.0 / rank) if factor.init == "B" else (a, 1.0 / n_in)
        source = torch.Generator("cpu").manual_seed(self.seed + 2)
        random.normal_(std=math.sqrt(variance), generator=source)
        return nn.Parameter(a), nn.Parameter(b)

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return the optimizer over two groups, without weight decay."""
        opt = self.optimizer(groups, lr=groups[0]["lr"], **self.settings)
        if hasattr(opt, "train"):  # schedule-free optimizers step in training mode only
            opt.train()
        switches = known_optimizer(type(opt))[1].switches
        for group in opt.param_groups:
            # LARS is another optimizer without it
            if all(switch.setting != "weight_decay" for switch in switches):
                group["weight_decay"] = 0.0
        return opt
