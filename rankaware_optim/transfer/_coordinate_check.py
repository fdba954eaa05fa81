"""The coordinate check: whether features move equally far at every rank, by a few steps of the real
optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import is_whole, shown
from .._printing import text_table
from .._rate import Rate
from .._types import Factor, Init, Reference
from ..errors import LawError
from ..inspection import inspect_model
from ..laws import Law, MuA, bound_law, checked_multiplier, get_law, law_words
from ._simulate import (
    Batch,
    Pair,
    Stepper,
    change_of,
    class_of,
    draw_pair,
    rates_for,
    rms_of_product,
    step_pair,
    synthetic,
)

Scaling = float | Callable[[int], float]
Shapes = Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]]
Captured = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class CoordinateRow:
    """The change in one layer at one rank after the steps. Sizes are rms per entry.

    Args:
        layer: the layer's name.
        fan_in: its number of inputs.
        fan_out: its number of outputs.
        rank: the LoRA rank.
        scaling: the effective multiplier s.
        lr_a: A's rate, per step.
        lr_b: B's rate, per step.
        from_b: size of s·ΔB·A₀·x.
        from_a: size of s·B₀·ΔA·x.
        from_both: size of s·ΔB·ΔA·x.
        inner: size of the features A·x.
        change: size of the output's whole change.
    """

    layer: str
    fan_in: int
    fan_out: int
    rank: int
    scaling: float
    lr_a: float
    lr_b: float
    from_b: float
    from_a: float
    from_both: float
    inner: float
    change: float


@dataclass(frozen=True)
class CoordinateCheck:
    """The result of `coordinate_check`.

    Args:
        rows: one entry per layer and rank.
        slopes: (layer, slope of log2 change against log2 rank).
        lr: the base rate: A's rate at the first layer and rank, per step.
        law: the law that gave the other rates.
        optimizer: the optimizer's name.
        tolerance: the largest slope that counts as rank-invariant.
    """

    rows: tuple[CoordinateRow, ...]
    slopes: tuple[tuple[str, float], ...]
    lr: float
    law: Law
    optimizer: str
    tolerance: float = 0.25

    @property
    def ok(self) -> bool:
        """Whether every layer's slope is within the tolerance."""
        return all(abs(slope) <= self.tolerance for _, slope in self.slopes)

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        layer, worst = max(self.slopes, key=lambda pair: abs(pair[1]))
        ranks = [row.rank for row in self.rows]
        verdict = "are rank-invariant" if self.ok else "are NOT rank-invariant"
        return (
            f"Feature updates {verdict} with {self.optimizer} at the rates of"
            f" {law_words(self.law)}: over ranks {min(ranks)} to {max(ranks)} the output's change"
            f" goes as r^{worst:+.2f} in {layer}, the"
            f" {'only layer' if len(self.slopes) == 1 else f'worst of {len(self.slopes)}'}"
            f" (tolerance {self.tolerance})."
        )

    def __str__(self) -> str:
        heads = [f.name for f in fields(CoordinateRow)]
        values = [[getattr(row, head) for head in heads] for row in self.rows]
        cells = [
            [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row]
            for row in values
        ]
        return text_table(heads, cells, lines=[self.sentence], left=("layer",), width=160)


def coordinate_check(  # noqa: PLR0913
    model_or_shapes: nn.Module | Shapes,
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int] = (4, 16, 64),
    widths: Sequence[int] | None = None,
    tokens: int = 512,
    lr: float | Rate | None = None,
    law: Law | str | None = None,
    init: Init = "A",
    scaling: Scaling = 1.0,
    steps: int = 4,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    captured: Captured | None = None,
    tolerance: float = 0.25,
) -> CoordinateCheck:
    """Check whether features move equally far at every rank, by a few steps of the real optimizer.

    Adapters of the given shapes are trained on a fixed batch, synthetic or captured. Weight decay
    is left out.

    Args:
        model_or_shapes: a model with adapters, or shapes of weights (n_out, n_in), by layer name or
            in order. Equal shapes are checked once.
        optimizer: a torch optimizer class or its name.
        ranks: the LoRA ranks to compare.
        widths: further fan-ins at which every shape is checked, with fan-outs in proportion.
        tokens: number of synthetic tokens.
        lr: A's rate at the first layer and rank, per step. By default the rate at which the output
            there moves by an rms of 1.
        law: the law that gives the other rates, by default µA. With synthetic tokens µA uses their
            number.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        scaling: the effective multiplier s, or a function of the rank that returns it.
        steps: number of optimizer steps.
        seed: random seed of factors and tokens.
        settings: the optimizer's settings other than lr.
        captured: by layer, inputs (n_in, tokens) and output gradients (n_out, tokens) of a real
            batch, from `capture`. They replace the synthetic ones.
        tolerance: the largest slope of log2 change against log2 rank that passes.

    Raises:
        LawError: an argument is impossible, the optimizer cannot be built or stepped, or no rate
            gives a finite change of the wanted size.

    >>> check = coordinate_check({"q": (64, 64)}, "AdamW", ranks=(4, 16), tokens=64)
    >>> check.ok, len(check.rows)
    (True, 2)
    """
    base = None if lr is None else float(lr)
    _check_request(ranks, widths, tokens, steps, init, base)
    kind = class_of(optimizer)
    stepper = Stepper(kind, settings or {}, steps, seed)
    own = MuA() if captured is not None else MuA(tokens=tokens)
    bound = bound_law(get_law(own if law is None else law), kind, stepper.settings)
    shapes = _shapes_of(model_or_shapes)
    if captured is not None:
        batches = {name: _unit(name, *tensors) for name, tensors in captured.items()}
    else:
        if widths is not None:
            of_width = (
                (f"{name} at width {w}", shape, w) for name, shape in shapes.items() for w in widths
            )
            shapes = {
                name: (max(1, round(n_out * w / n_in)), w) for name, (n_out, n_in), w in of_width
            }
        batches = {
            name: synthetic(n_in, n_out, tokens, seed) for name, (n_out, n_in) in shapes.items()
        }
    s_of = {rank: float(scaling(rank) if callable(scaling) else scaling) for rank in ranks}
    points = [
        _Point(name, batch, rank, s_of[rank]) for name, batch in batches.items() for rank in ranks
    ]
    at = Reference.from_scaling(ranks[0], s_of[ranks[0]], init="B" if init == "B" else "A")
    probe = _Probe(stepper, bound, replace(at, fan_in=float(len(points[0].batch.inputs))), init)
    base = probe.base_lr(points[0]) if base is None else base
    rows = tuple(probe.row(point, base) for point in points)
    slopes = tuple((name, _slope([row for row in rows if row.layer == name])) for name in batches)
    return CoordinateCheck(rows, slopes, base, bound, kind.__name__, tolerance)


def _check_request(
    ranks: object, widths: object, tokens: int, steps: int, init: str, lr: float | None
) -> None:
    if not _are_whole(ranks) or len(set(ranks)) < 2:
        raise LawError(
            f"ranks={shown(ranks)} cannot be checked.",
            "Give at least two positive ranks, such as (4, 64).",
            "ranks",
        )
    if widths is not None and not _are_whole(widths):
        raise LawError(
            f"widths={shown(widths)} cannot be checked.",
            "Give fan-ins, such as (256, 1024), or leave them out.",
            "widths",
        )
    if lr is not None and not 0 < lr < math.inf:
        raise LawError(
            f"lr={lr!r} cannot be checked.",
            "Give a positive finite number, or leave it out.",
            "lr",
        )
    for name, count in (("tokens", tokens), ("steps", steps)):
        if count < 1:
            raise LawError(
                f"{name}={count!r} cannot be checked.", "Give a positive whole number.", name
            )
    if init not in ("A", "B"):
        raise LawError(
            f"init={init!r} cannot be checked.",
            "Give 'A' (B starts at zero) or 'B' (A starts at zero).",
            "init",
        )


def _are_whole(values: object) -> TypeGuard[Sequence[int]]:
    """Return whether `values` is a non-empty sequence of positive whole numbers."""
    return (
        isinstance(values, (list, tuple, range)) and len(values) > 0 and all(map(is_whole, values))
    )


def _shapes_of(given: nn.Module | Shapes) -> dict[str, tuple[int, int]]:
    """Return (n_out, n_in) by layer, every shape once."""
    if isinstance(given, nn.Module):
        factors = (
            f for f in inspect_model(given).factors if f.kind != "embedding" and f.role == "A"
        )
        named: Iterable[tuple[str, Any]] = (
            (f.layer, (int(f.fan_out), int(f.fan_in))) for f in factors
        )
    elif isinstance(given, Mapping):
        named = given.items()
    elif isinstance(given, (list, tuple)):
        named = (
            ("x".join(map(str, shape)) if _are_whole(shape) else "A layer", shape)
            for shape in given
        )
    else:
        raise LawError(
            f"{shown(given)} is neither a model nor shapes.",
            "Give a model with adapters, or shapes {name: (n_out, n_in)}.",
        )
    once: dict[tuple[int, int], str] = {}
    for name, shape in named:
        if not _are_whole(shape) or len(shape) != 2:
            raise LawError(
                f"{name} has the shape {shown(shape)}.",
                "Give that of its weight: (n_out, n_in), such as (256, 256).",
            )
        once.setdefault((shape[0], shape[1]), name)
    if not once:
        raise LawError(
            "There is no layer to check.",
            "Give a model with adapters, or shapes {name: (n_out, n_in)}.",
        )
    return {name: shape for shape, name in once.items()}


def _unit(name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> Batch:
    """Return a real batch in float32 on the CPU, each side of rms 1. Tokens without gradient are
    left out.
    """
    x, g = (t.detach().to("cpu", torch.float32) for t in (inputs, gradients))
    if x.dim() != 2 or g.dim() != 2 or x.shape[1] != g.shape[1]:
        raise LawError(
            f"The layer {name} was captured as {tuple(x.shape)} and {tuple(g.shape)}.",
            "Give inputs (n_in, tokens) and output gradients (n_out, tokens).",
        )
    kept = g.abs().amax(dim=0) > 0
    x, g = x[:, kept], g[:, kept]
    sizes = [t.square().mean().sqrt().item() if t.numel() else 0.0 for t in (x, g)]
    if not all(0 < size < math.inf for size in sizes):
        raise LawError(
            f"The layer {name} has no gradient in the captured batch.",
            "Capture one with finite gradients.",
        )
    return Batch(x / sizes[0], g / sizes[1])


class _Point(NamedTuple):
    """One layer at one rank."""

    layer: str
    batch: Batch
    rank: int
    scaling: float


@dataclass(frozen=True)
class _Probe:
    """The settings common to all layers and ranks."""

    stepper: Stepper
    law: Law
    reference: Reference
    init: Init

    def rates(self, point: _Point, lr: float) -> tuple[float, float]:
        """Return the rates of A and B for a base rate."""
        n_in, n_out = (float(len(t)) for t in point.batch)
        a = Factor(point.layer, "A", point.rank, n_in, n_out, point.scaling, self.init)
        m_a, m_b = (
            checked_multiplier(self.law, f, self.reference) for f in (a, replace(a, role="B"))
        )
        return lr * m_a, lr * m_b

    def start(self, point: _Point) -> Pair:
        x, g = point.batch
        return draw_pair(len(x), len(g), point.rank, point.scaling, self.init, self.stepper.seed)

    def base_lr(self, point: _Point) -> float:
        """Return the base rate at which the output moves by an rms of 1."""
        start, batch = self.start(point), point.batch
        return rates_for(
            lambda lr: change_of(
                batch, step_pair(batch, start, self.stepper, *self.rates(point, lr))
            )
        )

    def row(self, point: _Point, lr: float) -> CoordinateRow:
        """Return the sizes after the steps at a base rate."""
        name, (x, g), rank, s = point
        lr_a, lr_b = self.rates(point, lr)
        start = self.start(point)
        end = step_pair(point.batch, start, self.stepper, lr_a, lr_b)
        d_a, d_b = end.a - start.a, end.b - start.b
        products = ((d_b, start.a), (start.b, d_a), (d_b, d_a))
        from_b, from_a, from_both = (
            s * rms_of_product(left, right @ x) for left, right in products
        )
        inner, change = (end.a @ x).square().mean().sqrt().item(), change_of(point.batch, end)
        if not 0 < change < math.inf or not math.isfinite(inner):
            raise LawError(
                f"The output of {name} moves by {change} at rank {rank} and rates {lr_a:.3g},"
                f" {lr_b:.3g}.",
                "Give a rate at which the optimizer takes finite steps, or leave the rate out.",
            )
        return CoordinateRow(
            name, len(x), len(g), rank, s, lr_a, lr_b, from_b, from_a, from_both, inner, change
        )


def _slope(rows: Sequence[CoordinateRow]) -> float:
    """Return the least-squares slope of log2 change against log2 rank."""
    points = [(math.log2(row.rank), math.log2(row.change)) for row in rows]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return float(
        sum((x - mean_x) * (y - mean_y) for x, y in points)
        / sum((x - mean_x) ** 2 for x, _ in points)
    )


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
    layers = {
        f.layer: (int(f.fan_in), int(f.fan_out))
        for f in inspect_model(model).factors
        if f.kind == "linear"
    }
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with _as_found(model), _watched(model, layers, seen), torch.enable_grad():
        loss = run(model)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise LawError(
                "run(model) returned no loss to differentiate.",
                "Return a scalar tensor with a gradient.",
            )
        wanted = {name: pair for name, pair in seen.items() if pair[1].requires_grad}
        outputs = [output for _, output in wanted.values()]
        gradients = torch.autograd.grad(loss.sum(), outputs, allow_unused=True) if outputs else ()
    found = zip(wanted.items(), gradients, strict=True)
    pairs = {name: (x, g.detach()) for (name, (x, _)), g in found if g is not None}
    kept = {
        name: (x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]).T)
        for name, (x, g) in pairs.items()
    }
    if not kept:
        raise LawError(
            "No adapted linear layer had a gradient.",
            "Let run(model) use the adapters in its loss.",
        )
    return kept


@contextmanager
def _watched(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            fans = tuple(
                t.shape[-1] if isinstance(t, torch.Tensor) and t.dim() else 0
                for t in (*args[:1], output)
            )
            if fans == layers[name]:
                seen[name] = (args[0].detach(), output)

        return keep

    handles = [
        m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers (running statistics), modes and random state afterwards."""
    gradients = [
        (p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    buffers = [(b, b.clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for p, grad, value in gradients:
                p.grad = grad if grad is None or value is None else grad.copy_(value)
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes:
            module.training = training
