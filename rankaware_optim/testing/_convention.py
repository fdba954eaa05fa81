"""Conformance of a convention: whether its layers are read as they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import InspectionError
from ..inspection import (
    Convention,
    Pair,
    conventions,
    inspect_model,
    other_kind,
    pairs_of,
    reading_of,
    register_convention,
    scaling_of,
    walk,
)

_BUILDS = ((2, 3.0), (2, 8.0), (4, 3.0), (4, 8.0))  # ranks and alphas
# AdaLoRA divides by rank + 1e-5; a wrong rank, fan-in or scaling gives a much larger error
_BAR = 1e-5
_Run = Callable[[nn.Module], Any]


def check_convention(
    make: Callable[[int, float], nn.Module],
    *inputs: Any,
    convention: Convention | None = None,
    run: Callable[..., Any] = nn.Module.__call__,
) -> float | None:
    """Check in float64 that inspection reads a layer correctly, at ranks 2 and 4, alphas 3 and 8.

    1. Every pair is found at the right rank, and by `convention` if one is given.
    2. With all entries of inputs, A and B equal to 1, B·A moves the output by scaling × rank ×
       inner × fan_in (fan-in 1 for an embedding), compared with B = 0. This checks rank, scaling
       and fan-in, if fan-in and fan-out differ.

    The global random state is restored.

    Args:
        make: `make(rank, alpha)` returns a new module at every call.
        *inputs: the module's inputs.
        convention: the convention that must find the pairs. It is registered for the call.
        run: `run(module, *inputs)` returns the output tensor.

    Returns:
        The largest relative error of the second check. None if it does not apply: several layers
        are adapted, or the output is not linear in B or does not depend on it.

    Raises:
        InspectionError: a check fails. The message says what was read.
    """
    ones, errors = [*map(_as_ones, inputs)], []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if convention is not None and convention not in conventions():
            register_convention(convention)
            stack.callback(register_convention, convention, remove=True)
        for rank, alpha in _BUILDS:
            module = make(rank, alpha).double()
            factors = inspect_model(module).factors
            ranks, rows = {f.rank for f in factors}, {f.convention for f in factors}
            names = rows if convention is None else {convention.name}
            if (ranks, rows) != ({rank}, names):
                raise InspectionError(
                    f"A build of rank {rank} is read at ranks {ranks}, by the conventions {rows}.",
                    "Register a Convention that says what holds the rank, and is tried first.",
                )
            errors += _probe(module, lambda m: run(m, *ones))
    return max(errors, default=None)


def _as_ones(value: Any) -> Any:
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return torch.ones_like(value).double() if is_floating else value


@torch.no_grad()
def _probe(module: nn.Module, run: _Run) -> list[float]:
    """Return the relative errors of the ones-probe by pair, [] if it does not apply."""
    pairs = [pair for pair in pairs_of(walk(module).modules) if pair.trains]
    if len({pair.layer for pair in pairs}) > 1:
        return []
    _set_to_units(pairs)
    errors = []
    for pair in pairs:
        moved = _moved_by_ones(module, pair, run)
        if moved is None:
            return []
        reading = reading_of(pair)
        scaling = scaling_of(pair, reading.rank_a) or 1.0
        fan_in = 1.0 if reading.kind == "embedding" else reading.fan_in
        expected = scaling * reading.rank_a * reading.inner * fan_in
        errors.append(abs(moved - expected) / expected)
        if not errors[-1] < _BAR:
            raise InspectionError(
                f"With ones everywhere {pair.where} moves the output by {moved:g}, and scaling"
                f" {scaling:g} × rank {reading.rank_a:g} × inner {reading.inner} × fan-in"
                f" {fan_in:g} is {expected:g}.",
                "Check the convention's layout and its attributes for rank and scaling.",
            )
    return errors


def _moved_by_ones(module: nn.Module, pair: Pair, run: _Run) -> float | None:
    """Return how far B = 1 moves the output from B = 0, None if it is not linear in B."""
    outputs = []
    for value in (1.0, 2.0, 0.0):
        pair.b.tensor.fill_(value)
        outputs.append(run(module).clone())
    once, twice = outputs[0] - outputs[2], outputs[1] - outputs[2]
    bar = 1e-9 * float(twice.abs().max())
    is_linear = torch.allclose(twice, 2 * once, rtol=1e-9, atol=bar)
    return float(once.abs().max()) if is_linear and once.any() else None


def _set_to_units(pairs: Sequence[Pair]) -> None:
    """Set every A to 1, every B and bias to 0, and a square core to the identity."""
    halves = {id(half.tensor) for pair in pairs for half in (pair.a, pair.b)}
    for pair in pairs:
        for name, param in pair.owner.named_parameters():
            if param.requires_grad and id(param) not in halves:
                param.fill_(0.0 if other_kind(name) == "LoRA bias" else 1.0)
                if param.dim() > 1 and param.shape[0] == param.shape[1]:
                    param.zero_().diagonal().fill_(1.0)
        pair.a.tensor.fill_(1.0)
        pair.b.tensor.fill_(0.0)
