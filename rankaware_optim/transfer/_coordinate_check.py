"""The coordinate check: whether features move equally far at every rank, by a few steps of the real
optimizer. And its figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from statistics import linear_regression
from textwrap import fill
from typing import Any, Literal, TypeGuard

from torch import nn
from torch.optim import Optimizer

from .._checks import is_whole, shown
from .._figures import COLOURS, figure_of, save, short
from .._optimizers import get_optimizer_class
from .._printing import Table
from .._rate import Rate
from .._types import Factor, Reference
from ..errors import LawError, OptimizerError
from ..inspection import inspect_model
from ..laws import Law, MuA, bound_law, checked_multiplier, get_law, law_title
from ._simulate import (
    Batch,
    Captured,
    Pair,
    Stepper,
    change_of,
    draw_pair,
    rates_for,
    rms_of_product,
    step_pair,
    synthetic,
    unit_batch,
)

ScalingOf = float | Callable[[int], float]
Shapes = Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]]
# Field, label and marker of a size in the figure.
_SIZES = (
    ("from_b", "s·ΔB·A₀·x", "o"),
    ("from_a", "s·B₀·ΔA·x", "s"),
    ("from_both", "s·ΔB·ΔA·x", "^"),
    ("inner", "inner features A·x", "D"),
)
_MOST_PANELS = 4


@dataclass(frozen=True)
class CoordinateRow:
    """The change in one layer at one rank after the steps. Sizes are rms per entry.

    Args:
        layer: the layer's name.
        fan_in: its number of inputs.
        fan_out: its number of outputs.
        rank: the LoRA rank.
        scaling: s, the factor of B·A.
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
        which = (
            "only layer" if len(self.slopes) == 1 else f"worst of {len(self.slopes)}"
        )
        return (
            f"Feature updates {verdict} with {self.optimizer}, {law_title(self.law)}: over ranks"
            f" {min(ranks)} to {max(ranks)} the output's change goes as r^{worst:+.2f} in {layer},"
            f" the {which} (tolerance {self.tolerance})."
        )

    def __str__(self) -> str:
        heads = [f.name for f in fields(CoordinateRow)]
        cells = [list(map(_cell, astuple(row))) for row in self.rows]
        return Table(heads, cells, [self.sentence], left=("layer",)).text(160)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def coordinate_check(  # noqa: PLR0913
    model_or_shapes: nn.Module | Shapes,
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int] = (4, 16, 64),
    widths: Sequence[int] | None = None,
    tokens: int = 512,
    lr: float | Rate | None = None,
    law: Law | str | None = None,
    init: Literal["A", "B"] = "A",
    scaling: ScalingOf = 1.0,
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
        scaling: s, or a function of the rank that returns it.
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
    try:
        kind = get_optimizer_class(optimizer)
    except OptimizerError as error:
        raise LawError(error.cause, error.cure, error.argument) from error
    stepper = Stepper(kind, settings or {}, steps, seed)
    shapes = _shapes_of(model_or_shapes)
    default = MuA(tokens=tokens)
    if captured is None:
        batches = _synthetic_batches(shapes, widths, tokens, seed)
    else:
        default = MuA()
        batches = {
            name: unit_batch(name, *tensors) for name, tensors in captured.items()
        }
    bound = bound_law(get_law(default if law is None else law), kind, stepper.settings)
    scalings = _scalings(scaling, ranks)
    first, rank = next(iter(batches.values())), ranks[0]
    reference = Reference(
        rank, scalings[rank] * rank, init=init, fan_in=float(len(first.inputs))
    )
    probe = _Probe(stepper, bound, reference, scalings)
    base = probe.base_lr(first) if base is None else base
    rows: list[CoordinateRow] = []
    slopes: list[tuple[str, float]] = []
    for name, batch in batches.items():
        of_layer = [probe.row(name, batch, rank, base) for rank in ranks]
        slopes.append((name, _slope(of_layer)))
        rows += of_layer
    return CoordinateCheck(
        tuple(rows), tuple(slopes), base, bound, kind.__name__, tolerance
    )


def _check_request(
    ranks: object, widths: object, tokens: int, steps: int, init: str, lr: float | None
) -> None:
    for name, value, possible, cure in (
        (
            "ranks",
            ranks,
            _are_whole(ranks) and len(set(ranks)) > 1,
            "Give at least two positive ranks, such as (4, 64).",
        ),
        (
            "widths",
            widths,
            widths is None or _are_whole(widths),
            "Give fan-ins, such as (256, 1024), or leave them out.",
        ),
        (
            "lr",
            lr,
            lr is None or 0 < lr < math.inf,
            "Give a positive finite number, or leave it out.",
        ),
        ("tokens", tokens, tokens > 0, "Give a positive whole number."),
        ("steps", steps, steps > 0, "Give a positive whole number."),
        (
            "init",
            init,
            init in ("A", "B"),
            "Give 'A' (B starts at zero) or 'B' (A starts at zero).",
        ),
    ):
        if not possible:
            raise LawError(f"{name}={shown(value)} cannot be checked.", cure, name)


def _scalings(scaling: ScalingOf, ranks: Sequence[int]) -> dict[int, float]:
    return {
        rank: float(scaling(rank) if callable(scaling) else scaling) for rank in ranks
    }


def _are_whole(values: object) -> TypeGuard[Sequence[int]]:
    """Return whether `values` is a non-empty sequence of positive whole numbers."""
    if not isinstance(values, (list, tuple, range)) or not values:
        return False
    return all(is_whole(value) for value in values)


def _shapes_of(source: nn.Module | Shapes) -> dict[str, tuple[int, int]]:
    """Return (n_out, n_in) by layer, every shape once."""
    once: dict[tuple[int, int], str] = {}
    for name, shape in _named_shapes(source):
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


def _named_shapes(source: nn.Module | Shapes) -> Iterable[tuple[str, object]]:
    if isinstance(source, nn.Module):
        return [
            (f.layer, (int(f.fan_out), int(f.fan_in)))
            for f in inspect_model(source).factors
            if f.role == "A" and f.kind != "embedding"
        ]
    if isinstance(source, Mapping):
        return source.items()
    if isinstance(source, (list, tuple)):
        return [(_name_of(shape), shape) for shape in source]
    raise LawError(
        f"{shown(source)} is neither a model nor shapes.",
        "Give a model with adapters, or shapes {name: (n_out, n_in)}.",
    )


def _name_of(shape: object) -> str:
    return "x".join(map(str, shape)) if _are_whole(shape) else "A layer"


def _synthetic_batches(
    shapes: Mapping[str, tuple[int, int]],
    widths: Sequence[int] | None,
    tokens: int,
    seed: int,
) -> dict[str, Batch]:
    batches = {}
    for name, (n_out, n_in) in shapes.items():
        for width in widths or (n_in,):
            title = f"{name} at width {width}" if widths else name
            scaled = max(1, round(n_out * width / n_in))
            batches[title] = synthetic(width, scaled, tokens, seed)
    return batches


@dataclass(frozen=True)
class _Probe:
    """The settings common to all layers, and the scaling of each rank."""

    stepper: Stepper
    law: Law
    reference: Reference
    scalings: Mapping[int, float]

    def rates(self, batch: Batch, rank: int, lr: float) -> tuple[float, float]:
        """Return the rates of A and B for a base rate."""
        n_in, n_out = (float(len(t)) for t in batch)
        a = Factor("", "A", rank, n_in, n_out, self.scalings[rank], self.reference.init)
        b = replace(a, role="B")
        m_a, m_b = (checked_multiplier(self.law, f, self.reference) for f in (a, b))
        return lr * m_a, lr * m_b

    def start(self, batch: Batch, rank: int) -> Pair:
        x, g = batch
        scaling, seed = self.scalings[rank], self.stepper.seed
        return draw_pair(len(x), len(g), rank, scaling, self.reference.init, seed)

    def base_lr(self, batch: Batch) -> float:
        """Return the base rate at which the output moves by an rms of 1 at the first rank."""
        rank = next(iter(self.scalings))
        start = self.start(batch, rank)

        def change(lr: float) -> float:
            rates = self.rates(batch, rank, lr)
            return change_of(batch, step_pair(batch, start, self.stepper, *rates))

        return rates_for(change)

    def row(self, name: str, batch: Batch, rank: int, lr: float) -> CoordinateRow:
        """Return the sizes after the steps at a base rate."""
        x, g = batch
        lr_a, lr_b = self.rates(batch, rank, lr)
        start = self.start(batch, rank)
        end = step_pair(batch, start, self.stepper, lr_a, lr_b)
        inner = (end.a @ x).square().mean().sqrt().item()
        change = change_of(batch, end)
        if not 0 < change < math.inf or not math.isfinite(inner):
            raise LawError(
                f"The output of {name} moves by {change} at rank {rank} and rates {lr_a:.3g},"
                f" {lr_b:.3g}.",
                "Give a rate at which the optimizer takes finite steps, or leave the rate out.",
            )
        s, d_a, d_b = start.scaling, end.a - start.a, end.b - start.b
        return CoordinateRow(
            layer=name,
            fan_in=len(x),
            fan_out=len(g),
            rank=rank,
            scaling=s,
            lr_a=lr_a,
            lr_b=lr_b,
            from_b=s * rms_of_product(d_b, start.a @ x),
            from_a=s * rms_of_product(start.b, d_a @ x),
            from_both=s * rms_of_product(d_b, d_a @ x),
            inner=inner,
            change=change,
        )


def _slope(rows: Sequence[CoordinateRow]) -> float:
    """Return the least-squares slope of log2 change against log2 rank."""
    ranks = [math.log2(row.rank) for row in rows]
    changes = [math.log2(row.change) for row in rows]
    return linear_regression(ranks, changes).slope


# --- the figure -----------------------------------------------------------------------------------


def plot_coordinates(check: CoordinateCheck, path: str | Path) -> Path:
    """Draw a coordinate check: sizes (rms) against rank, one panel per layer. The flat line is the
    wanted result.

    Of more than four layers, those with the steepest change are drawn. The legend says which terms
    are zero at every rank.

    Args:
        check: the result of `coordinate_check`.
        path: the file, a .png, .svg or .pdf.

    Returns:
        The path written.

    Raises:
        PlotError: matplotlib is not installed, or the file cannot be written.
    """
    worst = sorted(check.slopes, key=lambda pair: -abs(pair[1]))[:_MOST_PANELS]
    drawn = [pair for pair in check.slopes if pair in worst]
    width = max(7.0, 3.8 * len(drawn))
    figure, axes = figure_of(len(drawn), width, height=5.0, sharey=True)
    for axis, (layer, slope) in zip(axes, drawn, strict=True):
        rows = [row for row in check.rows if row.layer == layer]
        _draw_sizes(axis, sorted(rows, key=lambda row: row.rank))
        axis.set_title(f"{short(layer)}: r^{slope:+.2f}", fontsize=10, parse_math=False)
    axes[0].set_ylabel("rms per entry")
    figure.suptitle(
        fill(check.sentence, int(13 * width)), fontsize=10, parse_math=False
    )
    columns = 3 if width < 11 else 6
    labelled = axes[0].get_legend_handles_labels()
    figure.legend(
        *labelled, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return save(figure, path)


def _draw_sizes(axis: Any, rows: Sequence[CoordinateRow]) -> None:
    ranks = [row.rank for row in rows]
    for (field, label, marker), colour in zip(_SIZES, COLOURS[1:], strict=False):
        sizes = [getattr(row, field) for row in rows]
        style = {"marker": marker, "color": colour, "linewidth": 1}
        if any(sizes):
            axis.plot(ranks, sizes, label=label, **style)
        else:
            axis.plot((), (), label=f"{label}: zero", **style)
    changes = [row.change for row in rows]
    axis.plot(
        ranks, changes, "o-", color=COLOURS[0], linewidth=2.5, label="whole change"
    )
    flat = {"color": "0.5", "linestyle": "--", "linewidth": 1, "zorder": 0}
    axis.axhline(changes[0], label="flat, as wanted", **flat)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}")
    axis.set_xlabel("rank")
