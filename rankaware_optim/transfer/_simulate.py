"""One adapted layer under a real optimizer: how far a few steps move its output, and which rate
moves it by a target.

Nothing is trained and no frozen weight is needed. Inputs x (n_in, tokens) and output gradients g
(n_out, tokens) are held fixed. The gradients are dL/dA = s·Bᵀ·g·xᵀ and dL/dB = s·g·(A·x)ᵀ. The
layer's output moves by s·(B·A − B₀·A₀)·x, where B₀·A₀ = 0. Weight decay is set to 0, because a few
large steps would exaggerate it. LARS keeps it, since it needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .._optimizers import get_optimizer_class, known_optimizer
from ..errors import LawError, RankAwareError

Change = Callable[[float], float]


class Batch(NamedTuple):
    """Inputs (n_in, tokens) and output gradients (n_out, tokens) of one layer. Their entries have
    rms 1.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor


class Stepper(NamedTuple):
    """An optimizer class, its settings other than lr, and the number of steps it takes."""

    optimizer: type[Optimizer]
    settings: Mapping[str, Any]
    steps: int = 4
    seed: int = 0


class Pair(NamedTuple):
    """A (r, n_in) and B (n_out, r), and the effective multiplier s of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def synthetic(fan_in: int, fan_out: int, tokens: int, seed: int = 0) -> Batch:
    """Draw independent inputs and output gradients, each token's of rms 1. The global generator is
    not used.
    """
    source = torch.Generator().manual_seed(seed)
    return Batch(*(_columns(fan, tokens, source) for fan in (fan_in, fan_out)))


def _columns(fan: int, tokens: int, source: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(fan, tokens, generator=source, dtype=torch.float32, device="cpu")
    return drawn / drawn.square().mean(dim=0).sqrt()


def draw_pair(
    fan_in: int, fan_out: int, rank: int, scaling: float, init: str, seed: int = 0
) -> Pair:
    """Draw a pair. Init[A]: A of variance 1/n_in, B = 0. Init[B]: B of variance 1/r, A = 0."""
    source = torch.Generator().manual_seed(seed + 1)
    a, b = _zeros(rank, fan_in), _zeros(fan_out, rank)
    drawn, size = (b, 1.0 / rank) if init == "B" else (a, 1.0 / fan_in)
    drawn.normal_(generator=source).mul_(math.sqrt(size))
    return Pair(a, b, scaling)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def step_pair(batch: Batch, start: Pair, stepper: Stepper, lr_a: float, lr_b: float) -> Pair:
    """Return the pair after the optimizer's steps from `start`, which is not changed."""
    x, g = batch
    a, b = nn.Parameter(start.a.clone()), nn.Parameter(start.b.clone())

    def set_gradients() -> None:
        a.grad = start.scaling * (b.detach().T @ g) @ x.T
        b.grad = start.scaling * g @ (a.detach() @ x).T

    advance(stepper, [(a, lr_a), (b, lr_b)], set_gradients)
    return Pair(a.detach(), b.detach(), start.scaling)


def advance(
    stepper: Stepper, rated: list[tuple[nn.Parameter, float]], set_gradients: Callable[[], None]
) -> None:
    """Build the optimizer on the parameters at their rates and take its steps. Call `set_gradients`
    before each.
    """
    groups = [{"params": [param], "lr": lr} for param, lr in rated]
    settings = {key: value for key, value in stepper.settings.items() if key != "lr"}
    build: Callable[..., Any] = stepper.optimizer
    with torch.random.fork_rng(devices=()):  # for optimizers that draw numbers
        torch.default_generator.manual_seed(stepper.seed)
        try:
            opt = build(groups, lr=rated[0][1], **settings)
            getattr(
                opt, "train", lambda: None
            )()  # schedule-free optimizers step in training mode only
            for group in (
                opt.param_groups if not known_optimizer(stepper.optimizer)[1].needs_decay else ()
            ):
                group.update({"weight_decay": 0.0} if "weight_decay" in group else {})
            for _ in range(stepper.steps):
                set_gradients()
                opt.step()
        except Exception as error:  # a third-party optimizer may raise anything
            name, shown = stepper.optimizer.__name__, f"{type(error).__name__}: {error}"
            raise LawError(
                f"{name} could not step LoRA factors with settings {dict(stepper.settings)!r}:"
                f" {shown}.",
                "Give settings= that let it step two matrices without a closure, or choose another"
                " law.",
            ) from error


def rms_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the root mean square of left @ right (n_out, tokens), by the small Gram matrix of
    `left` (n_out, r).
    """
    total = torch.sum(right * ((left.T @ left) @ right)).item()
    return (
        math.sqrt(max(total, 0.0) / (left.shape[0] * right.shape[1]))
        if math.isfinite(total)
        else math.inf
    )


def change_of(batch: Batch, pair: Pair) -> float:
    """Return the root mean square of s·B·A·x. This is the whole change of the output, since B₀·A₀ =
    0.
    """
    return float(pair.scaling * rms_of_product(pair.b, pair.a @ batch.inputs))


# --- the rate at which the output moves by the target ---------------------------------------------

_RANGE = 60  # octaves: rates from 2^-60 to 2^60 are searched


def rates_for(change: Change, target: float = 1.0, *, start: float = 2.0**-8) -> float:
    """Return the rate at which the rising function `change(rate)` reaches `target`, to 1 % of the
    target.

    The method is false position on logarithms, with bisection if it stalls. An overflow counts as
    too high a rate.

    Args:
        change: the output's rms change as a function of the rate.
        target: the change to reach.
        start: the first rate to try.

    Raises:
        LawError: no rate within 2^±60 reaches the target, or the change jumps past it.
    """
    x = math.log2(start)
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    for turn in range(80):
        y = _octaves(change(2.0**x), target)
        if abs(y) < 0.01:
            return float(2.0**x)
        low, high = ((x, y), high) if y < 0 else (low, (x, y))
        if (
            low and high and high[0] - low[0] < 2**-10
        ):  # rounding in the optimizer makes small jumps
            nearer = min(low, high, key=lambda side: abs(side[1]))
            if abs(nearer[1]) < 0.1:
                return float(2.0 ** nearer[0])
            break
        x = _next(low, high, turn)
        if abs(x) > _RANGE:
            break
    raise LawError(
        f"The output never moves by {target:g} at any rate: nearest were {_shown(low)} and"
        f" {_shown(high)}.",
        "Check the optimizer's settings (a built-in rate, a cap, clipping), or choose another law"
        " or target.",
    )


def _octaves(value: float, target: float) -> float:
    return (
        math.inf
        if not math.isfinite(value)
        else math.log2(value / target)
        if value > 0
        else -math.inf
    )


def _next(low: tuple[float, float] | None, high: tuple[float, float] | None, turn: int) -> float:
    """Return the next log2 rate: false position between two bounds, else a step of up to 8 octaves
    to the open side.
    """
    if low is None or high is None:
        x, y = low or high or (0.0, 0.0)
        return x - math.copysign(min(8.0, max(abs(y) / 1.5, 0.05)), y)
    if turn % 3 == 2 or not (math.isfinite(low[1]) and math.isfinite(high[1])):
        return (low[0] + high[0]) / 2
    return low[0] + (high[0] - low[0]) * low[1] / (low[1] - high[1])


def _shown(side: tuple[float, float] | None) -> str:
    return "none" if side is None else f"2^{side[1]:.1f} of it at 2^{side[0]:.1f}"


def class_of(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """Return `get_optimizer_class(optimizer)`; its errors become a `LawError`."""
    try:
        return get_optimizer_class(optimizer)
    except RankAwareError as error:
        raise LawError(error.cause, error.cure) from error
