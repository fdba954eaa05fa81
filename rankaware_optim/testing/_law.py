"""Conformance of a law: the properties on which the package relies, checked on a grid of
configurations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import tomli
import tomli_w
import torch

from .._types import Factor, Reference
from ..errors import LawError
from ..laws import (
    Law,
    bound_law,
    checked_multiplier,
    get_law,
    law_from_dict,
    law_to_dict,
    registered_law,
)

_RANKS = (1, 4, 64)
_ALPHAS = (16.0, 2.0)
_INITS: tuple[Literal["A", "B"], ...] = ("A", "B")


@dataclass(frozen=True)
class LawConformance:
    """The result of `check_law` for a law that passed.

    Args:
        law: the law.
        registered: whether its name is registered. If not, recipes cannot store the law.
    """

    law: Law
    registered: bool


def check_law(
    law: str | Law,
    *,
    fan_in: Iterable[float] = (1.0, 4096.0),
    tolerance: float = 1e-9,
) -> LawConformance:
    """Check that a law has the properties of every law.

    - Every multiplier is a positive finite number, for A, B and whole weights, from LoRA and from
      full finetuning.
    - Multipliers compose: a → b → c equals a → c. At its own reference a multiplier is 1.
    - If its name is registered, the law is read back from TOML as it was.

    The configurations have ranks from 1 to 64, two alphas and both inits.

    Args:
        law: the law or its name.
        fan_in: the widths to check. 1 is that of an embedding.
        tolerance: relative error of the composition. Use a larger one for a measured law.

    Raises:
        LawError: a property fails. The message names the first one, with the configurations.

    >>> check_law("constant")
    LawConformance(law=Constant(), registered=True)
    """
    law = get_law(law)
    bound_law(law, torch.optim.AdamW, {})
    references = []
    for width in fan_in:
        references.append(Reference(method="full", fan_in=width))
        for rank, alpha, init in itertools.product(_RANKS, _ALPHAS, _INITS):
            references.append(Reference(rank, alpha, init=init, fan_in=width))
    for reference, at in itertools.product(references, repeat=2):
        if at.method == "lora":
            _ask(law, replace(at.as_factor(), role="B"), reference)
    moves = {
        (a, b): _ask(law, b.as_factor(), a)
        for a, b in itertools.product(references, repeat=2)
    }
    for a, b, c in itertools.product(references, repeat=3):
        direct, by_way = moves[a, c], moves[a, b] * moves[b, c]
        if not math.isclose(by_way, direct, rel_tol=tolerance):
            raise LawError(
                f"The check 'composes' fails for the law {law!r}: from {_at(a)} to {_at(c)} it"
                f" returns {direct:g}, but {by_way:g} by way of {_at(b)}.",
                "Write the multiplier as a rate at the factor divided by the same rate at the"
                " reference.",
            )
    try:
        registered_law(law.name)
    except LawError:
        return LawConformance(law, registered=False)
    _check_toml(law)
    return LawConformance(law, registered=True)


def _ask(law: Law, factor: Factor, reference: Reference) -> float:
    try:
        return checked_multiplier(law, factor, reference)
    except LawError as error:
        where = f"{factor.role} at {factor.name}, tuned at {_at(reference)}"
        raise LawError(
            f"The check 'positive' fails for {where}: {error.cause}", error.cure
        ) from error


def _at(reference: Reference) -> str:
    return f"{reference}, fan-in {reference.fan_in:g}"


def _check_toml(law: Law) -> None:
    """Check that the law is read back from TOML as it was."""
    try:
        read = law_from_dict(tomli.loads(tomli_w.dumps(law_to_dict(law))))
        cause = f"it is read back as {read!r}"
    except Exception as error:  # tomli_w raises TypeError, a law may raise anything
        read, cause = None, f"it raises {error!r}"
    if read != law:
        raise LawError(
            f"The check 'toml' fails for the law {law!r}: {cause}.",
            "Make it a frozen dataclass whose fields are numbers, texts, booleans or laws, all"
            " with defaults, and register it under its own name.",
        )
