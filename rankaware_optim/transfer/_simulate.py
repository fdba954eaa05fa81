"""One adapted layer under a real optimizer: how far a few steps move its output, and which rate
moves it by a target.

Nothing is trained and no frozen weight is needed. Inputs x (n_in, tokens) and output gradients g
(n_out, tokens) are held fixed. The gradients are dL/dA = s·Bᵀ·g·xᵀ and dL/dB = s·g·(A·x)ᵀ. The
layer's output moves by s·(B·A − B₀·A₀)·x, where B₀·A₀ = 0. Weight decay is set to 0, because a few
large steps would exaggerate it. LARS keeps it, since it needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .._optimizers import known_optimizer
from ..errors import LawError
from ..inspection import inspect_model

Captured = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
_RANGE = 60  # octaves: rates from 2^-60 to 2^60 are searched


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

    def built(self, rated: list[tuple[nn.Parameter, float]]) -> Optimizer:
        """Return the optimizer over parameters at their rates, without weight decay."""
        groups = [{"params": [param], "lr": lr} for param, lr in rated]
        settings = {key: value for key, value in self.settings.items() if key != "lr"}
        build: Callable[..., Any] = self.optimizer
        opt: Optimizer = build(groups, lr=rated[0][1], **settings)
        if hasattr(opt, "train"):  # schedule-free optimizers step in training mode only
            opt.train()
        switches = known_optimizer(self.optimizer)[1].switches
        for group in opt.param_groups:
            if all(switch.setting != "weight_decay" for switch in switches):
                group["weight_decay"] = 0.0
        return opt


class Pair(NamedTuple):
    """A (r, n_in) and B (n_out, r), and the scaling s of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def synthetic(fan_in: int, fan_out: int, tokens: int, seed: int = 0) -> Batch:
    """Draw independent inputs and output gradients, each token's of rms 1. The global generator is
    not used.
    """
    source = torch.Generator().manual_seed(seed)
    sides = []
    for fan in (fan_in, fan_out):
        drawn = torch.randn(
            fan, tokens, generator=source, dtype=torch.float32, device="cpu"
        )
        sides.append(drawn / drawn.square().mean(dim=0).sqrt())
    return Batch(*sides)


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


def step_pair(
    batch: Batch, start: Pair, stepper: Stepper, lr_a: float, lr_b: float
) -> Pair:
    """Return the pair after the optimizer's steps from `start`, which is not changed."""
    x, g = batch
    s = start.scaling
    a, b = nn.Parameter(start.a.clone()), nn.Parameter(start.b.clone())
    with torch.random.fork_rng(devices=()):  # for optimizers that draw numbers
        torch.default_generator.manual_seed(stepper.seed)
        try:
            opt = stepper.built([(a, lr_a), (b, lr_b)])
            for _ in range(stepper.steps):
                a.grad = s * (b.detach().T @ g) @ x.T
                b.grad = s * g @ (a.detach() @ x).T
                opt.step()
        except Exception as error:  # a third-party optimizer may raise anything
            raise LawError(
                f"{stepper.optimizer.__name__} could not step LoRA factors with settings"
                f" {dict(stepper.settings)!r}: {type(error).__name__}: {error}.",
                "Give settings= that let it step two matrices without a closure, or choose another"
                " law.",
            ) from error
    return Pair(a.detach(), b.detach(), s)


def rms_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the root mean square of left @ right (n_out, tokens), by the small Gram matrix of
    `left` (n_out, r).
    """
    total = torch.sum(right * ((left.T @ left) @ right)).item()
    if not math.isfinite(total):
        return math.inf
    return math.sqrt(max(total, 0.0) / (left.shape[0] * right.shape[1]))


def change_of(batch: Batch, pair: Pair) -> float:
    """Return the root mean square of s·B·A·x. This is the whole change of the output, since B₀·A₀ =
    0.
    """
    return float(pair.scaling * rms_of_product(pair.b, pair.a @ batch.inputs))


# --- the rate at which the output moves by the target ---------------------------------------------


class _Side(NamedTuple):
    """A rate that was tried, as log2, and by how many octaves the change missed the target."""

    x: float
    miss: float

    def __str__(self) -> str:
        if math.isinf(self.x):
            return "none"
        return f"2^{self.miss:.1f} of it at 2^{self.x:.1f}"


def rates_for(
    change: Callable[[float], float], target: float = 1.0, *, start: float = 2.0**-8
) -> float:
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
    low, high = _Side(-math.inf, -math.inf), _Side(math.inf, math.inf)  # none yet
    for turn in range(80):
        tried = _Side(x, _octaves(change(2.0**x), target))
        if abs(tried.miss) < 0.01:
            return float(2.0**x)
        low, high = (tried, high) if tried.miss < 0 else (low, tried)
        if high.x - low.x < 2**-10:
            nearer = min(low, high, key=lambda side: abs(side.miss))
            if abs(nearer.miss) < 0.1:  # rounding in the optimizer makes small jumps
                return float(2.0**nearer.x)
            break
        x = _next(low, high, turn)
        if abs(x) > _RANGE:
            break
    raise LawError(
        f"The output never moves by {target:g} at any rate: nearest were {low} and {high}.",
        "Check the optimizer's settings (a built-in rate, a cap, clipping), or choose another law"
        " or target.",
    )


def _octaves(value: float, target: float) -> float:
    if not math.isfinite(value):
        return math.inf
    return math.log2(value / target) if value > 0 else -math.inf


def _next(low: _Side, high: _Side, turn: int) -> float:
    """Return the next log2 rate: false position between two bounds, else a step of up to 8 octaves
    to the open side.
    """
    if math.isinf(high.x - low.x):
        x, miss = low if math.isinf(high.x) else high
        return x - math.copysign(min(8.0, max(abs(miss) / 1.5, 0.05)), miss)
    if turn % 3 == 2 or math.isinf(high.miss - low.miss):
        return (low.x + high.x) / 2
    return low.x + (high.x - low.x) * low.miss / (low.miss - high.miss)


# --- a real batch ---------------------------------------------------------------------------------


def capture(
    model: nn.Module, run: Callable[[nn.Module], torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Capture inputs and output gradients of every adapted linear layer in one real batch.

    Parameters, gradients, buffers, modes and random state are restored. Convolutions, embeddings
    and layers without effect on the loss are left out.

    Args:
        model: the model with adapters.
        run: does the forward pass and returns the loss, without a backward pass.

    Returns:
        By layer, inputs (n_in, tokens) and output gradients (n_out, tokens).

    Raises:
        LawError: the loss has no gradient, or no layer is left.
    """
    fans = {
        f.layer: (int(f.fan_in), int(f.fan_out))
        for f in inspect_model(model).factors
        if f.kind == "linear"
    }
    passed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shape = _features(*args[:1]), _features(output)
        if shape == fans[name] and output.requires_grad:
            passed[name] = (args[0].detach(), output)

    with _restored(model), ExitStack() as hooks, torch.enable_grad():
        for name, module in model.named_modules():
            if name in fans:
                hook = module.register_forward_hook(partial(watch, name))
                hooks.enter_context(hook)
        loss = _loss_of(model, run)
        layers = list(passed.items())
        outputs = [output for _, (_, output) in layers]
        gradients = (
            torch.autograd.grad(loss.sum(), outputs, allow_unused=True)
            if layers
            else ()
        )
    captured = {}
    for (name, (inputs, _)), gradient in zip(layers, gradients, strict=True):
        if gradient is not None:
            captured[name] = (_by_token(inputs), _by_token(gradient.detach()))
    if not captured:
        raise LawError(
            "No adapted linear layer had a gradient.",
            "Let run(model) use the adapters in its loss.",
        )
    return captured


def _loss_of(
    model: nn.Module, run: Callable[[nn.Module], torch.Tensor]
) -> torch.Tensor:
    loss: object = run(model)
    if (
        not isinstance(loss, torch.Tensor)
        or loss.numel() != 1
        or not loss.requires_grad
    ):
        raise LawError(
            "run(model) returned no loss to differentiate.",
            "Return a scalar tensor with a gradient.",
        )
    return loss


def _features(value: object = None) -> int:
    """Return the size of a tensor's last axis, 0 for what has none."""
    return value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() else 0


def _by_token(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor (..., n) as (n, tokens)."""
    return tensor.reshape(-1, tensor.shape[-1]).T


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Hide gradients, and restore them, buffers (running statistics), modes and random state
    afterwards.
    """
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    model.zero_grad()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for p, grad in gradients:
            p.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes:
            module.training = training


def unit_batch(name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> Batch:
    """Return a captured batch in float32 on the CPU, each side of rms 1. Tokens without gradient
    are left out.
    """
    x, g = (t.detach().to("cpu", torch.float32) for t in (inputs, gradients))
    if x.dim() != 2 or g.dim() != 2 or x.shape[1] != g.shape[1]:
        raise LawError(
            f"The layer {name} was captured as {tuple(x.shape)} and {tuple(g.shape)}.",
            "Give inputs (n_in, tokens) and output gradients (n_out, tokens).",
        )
    has_gradient = g.abs().amax(dim=0) > 0
    x, g = x[:, has_gradient], g[:, has_gradient]
    sizes = [t.square().mean().sqrt().item() if t.numel() else 0.0 for t in (x, g)]
    if not all(0 < size < math.inf for size in sizes):
        raise LawError(
            f"The layer {name} has no gradient in the captured batch.",
            "Capture one with finite gradients.",
        )
    return Batch(x / sizes[0], g / sizes[1])
