"""Conformance of a convention: whether its layers are read as they compute."""

from __future__ import annotations

from collections.abc import Callable
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
    pairs_of,
    reading_of,
    register_convention,
    scaling_of,
    walk,
)

_BUILDS = ((2, 3.0), (2, 8.0), (4, 3.0), (4, 8.0))  # ranks and alphas
_BAR = 1e-9  # a wrong rank, fan-in or scaling gives a much larger error
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
        make: `make(rank, alpha)` returns a new module at every call, whose output is linear in B.
        *inputs: the module's inputs.
        convention: the convention that must find the pairs. It is registered for the call.
        run: `run(module, *inputs)` returns the output tensor.

    Returns:
        The largest relative error of the second check. None if it does not apply, since other
        parameters train too, or several layers are adapted.

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
    """Return the relative error of every pair."""
    pairs = _pairs_alone(module)
    for pair in pairs:
        pair.a.tensor.fill_(1.0)
        pair.b.tensor.fill_(0.0)
    start, errors = run(module).clone(), []
    for pair in pairs:
        pair.b.tensor.fill_(1.0)
        moved = float((run(module) - start).abs().max())
        pair.b.tensor.fill_(0.0)
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


def _pairs_alone(module: nn.Module) -> list[Pair]:
    """Return the pairs of a module's one adapted layer, [] if there are more or others train."""
    walked = walk(module)
    pairs = [pair for pair in pairs_of(walked.modules) if pair.trains]
    halves = {half.tensor for pair in pairs for half in (pair.a, pair.b)}
    trained = {param for _, param in walked.parameters if param.requires_grad}
    is_alone = trained <= halves and len({pair.layer for pair in pairs}) == 1
    return pairs if is_alone else []
