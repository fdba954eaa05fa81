"""This module tests extensions that other packages define.

`check_convention` checks that a convention
describes what its layers compute. `check_law` checks that a law has the properties on
which this package relies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import tomli
import tomli_w
import torch
from torch import nn

from ._types import Reference
from .errors import InspectionError, LawError
from .inspection import (
    Convention,
    Survey,
    conventions,
    inspect_model,
    reading_of,
    register_convention,
    scaling_of,
    walk,
)
from .laws import (
    Law,
    checked_multiplier,
    get_law,
    law_from_dict,
    law_to_dict,
    registered_law,
)

__all__ = ["check_convention", "check_law"]

# --- a convention ---------------------------------------------------------------------------------

_BUILDS = ((2, 3.0), (2, 8.0), (4, 3.0), (4, 8.0))  # ranks and alphas
_BAR = 1e-9  # a wrong rank, fan-in or scaling gives a much larger error


def check_convention(
    make: Callable[[int, float], nn.Module],
    *inputs: Any,
    convention: Convention | None = None,
    run: Callable[..., Any] = nn.Module.__call__,
) -> float | None:
    """Check that this package reads a layer correctly, at the ranks 2 and 4 and the
    alphas 3 and 8, in float64.

    1. Every LoRA pair must be found with the right rank and, if `convention` was
       passed, with that convention.
    2. If all entries of the inputs, A and B are 1, B·A must change the output by
       scaling × rank × inner × fan_in, compared with B = 0. (For an embedding the
       fan-in is 1.) This checks the rank, the scaling and, if fan-in and fan-out
       differ, the fan-in.

    After the check, the global random state is restored.

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
    ones = []
    errors = []
    for value in inputs:
        is_float = getattr(value, "is_floating_point", bool)()
        ones.append(torch.ones_like(value).double() if is_float else value)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if convention is not None and convention not in conventions():
            register_convention(convention)
            stack.callback(register_convention, convention, remove=True)
        for rank, alpha in _BUILDS:
            module = make(rank, alpha).double()
            survey = inspect_model(module)
            ranks = {f.rank for f in survey.factors}
            rows = {f.convention for f in survey.factors}
            names = rows if convention is None else {convention.name}
            used = " and ".join(sorted(rows))
            if ranks != {rank}:
                wrong = " and ".join(sorted(map(str, ranks)))
                raise InspectionError(
                    f"make({rank}, {alpha:g}) returned a module whose rank was read as {wrong}"
                    f" instead of {rank}. The convention {used!r} was used.",
                    "Set the `rank` field of the convention to the name of the attribute that"
                    " contains the rank.",
                )
            if rows != names:
                expected = min(names)
                raise InspectionError(
                    f"The convention {expected!r} does not match the module. Its LoRA matrices were"
                    f" found with the convention {used!r}.",
                    f"Change the fields `a`, `b` and `where` of {expected!r} so that they match the"
                    " module that contains the LoRA matrices.",
                )
            errors += _probe(module, survey, partial(run, module, *ones))
    return max(errors, default=None)


@torch.no_grad()
def _probe(module: nn.Module, survey: Survey, run: Callable[[], Any]) -> list[float]:
    """Return the relative error of the output for every LoRA pair, or an empty list if
    other layers or parameters train too.
    """
    trained = {*survey.other, *(f.layer for f in survey.factors)}
    if len(trained) > 1:
        return []
    pairs = [pair for pair in walk(module).pairs if pair.trains]
    for pair in pairs:
        pair.a.tensor.fill_(1.0)
        pair.b.tensor.fill_(0.0)
    start = run().clone()
    errors = []
    for pair in pairs:
        pair.b.tensor.fill_(1.0)
        change = run() - start
        moved = float(change.abs().max())
        pair.b.tensor.fill_(0.0)
        reading = reading_of(pair)
        scaling = scaling_of(pair, reading.rank_a) or 1.0
        fan_in = 1.0 if reading.kind == "embedding" else reading.fan_in
        layer, rank, inner = pair.where, reading.rank_a, reading.inner
        expected = scaling * rank * inner * fan_in
        errors.append(abs(moved - expected) / expected)
        if not errors[-1] < _BAR:
            raise InspectionError(
                f"The layer {layer} does not compute what its convention states. If all inputs and"
                f" all entries of A and B are 1, the output should change by {expected:g} (scaling"
                f" {scaling:g} × rank {rank:g} × inner {inner} × fan-in {fan_in:g}), but it changes"
                f" by {moved:g}.",
                "Correct the layout of the convention, or its fields for rank and scaling.",
            )
    return errors


# --- a law ----------------------------------------------------------------------------------------

_RANKS = (1, 4, 64)
_ALPHAS = (16.0, 2.0)
_INITS: tuple[Literal["A", "B"], ...] = ("A", "B")


def check_law(
    law: str | Law,
    *,
    fan_in: Iterable[float] = (1.0, 4096.0),
    tolerance: float = 1e-9,
) -> None:
    """Check that a law has the properties that every law must have.

    - Every multiplier must be a positive finite number: for A, B and whole weights, and
      from LoRA as well as from full finetuning.
    - Multipliers must compose: the multiplier from configuration a to c must be the
      multiplier from a to b times the multiplier from b to c. The multiplier from a
      configuration to itself must be 1.
    - If the law is registered, writing it to TOML and reading it back must return an
      equal law.

    The check uses ranks from 1 to 64, two alphas and both inits.

    Args:
        law: the law or its name.
        fan_in: the widths to check. 1 is that of an embedding.
        tolerance: relative error of the composition. Use a larger one for a measured law.

    Raises:
        LawError: a property fails. The message has the configurations.

    >>> check_law("constant")
    """
    law = get_law(law)
    bound = law.bind(torch.optim.AdamW, {})
    references = []
    for width in fan_in:
        references.append(Reference(method="full", fan_in=width))
        for rank, alpha, init in itertools.product(_RANKS, _ALPHAS, _INITS):
            references.append(Reference(rank, alpha, init=init, fan_in=width))
    origin = references[0]
    for a, b in itertools.product(references, repeat=2):
        factor = b.as_factor()
        direct = checked_multiplier(law, factor, a)
        checked_multiplier(bound, factor, a)
        if b.method == "lora":
            checked_multiplier(law, replace(factor, role="B"), a)
        to_a = checked_multiplier(law, a.as_factor(), origin)
        expected = checked_multiplier(law, factor, origin) / to_a
        if not math.isclose(expected, direct, rel_tol=tolerance):
            raise LawError(
                f"The multipliers of the law {law!r} do not compose. The multiplier from {a!r} to"
                f" {b!r} is {direct:g}, but it must be {expected:g}. This is the multiplier from"
                f" {origin!r} to {b!r}, divided by the multiplier from {origin!r} to {a!r}.",
                "Write multiplier() as a quotient: a function of the factor, divided by the same"
                " function of the reference.",
            )
    try:
        registered_law(law.name)
    except LawError:  # no recipe can hold it
        return
    text = tomli_w.dumps(law_to_dict(law))
    result = law_from_dict(tomli.loads(text))
    if result != law:
        raise LawError(
            f"Writing the law {law!r} to TOML and reading it back returned a different law,"
            f" {result!r}.",
            "Make the law's class a frozen dataclass whose fields are numbers, strings, booleans or"
            " laws. Set a default for every field, and register the law under its own name.",
        )
