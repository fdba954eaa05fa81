"""Conformance of a law: the properties on which the package relies, checked on a grid of
configurations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import tomli
import tomli_w
import torch

from .._types import Reference
from ..errors import LawError
from ..laws import (
    Law,
    checked_multiplier,
    get_law,
    law_from_dict,
    law_to_dict,
    registered_law,
)

_RANKS = (1, 4, 64)
_ALPHAS = (16.0, 2.0)
_INITS: tuple[Literal["A", "B"], ...] = ("A", "B")


def check_law(
    law: str | Law,
    *,
    fan_in: Iterable[float] = (1.0, 4096.0),
    tolerance: float = 1e-9,
) -> None:
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
        by_way = checked_multiplier(law, factor, origin) / to_a
        if not math.isclose(by_way, direct, rel_tol=tolerance):
            raise LawError(
                f"The law {law!r} does not compose: from {a!r} to {b!r} it returns {direct:g}, but"
                f" {by_way:g} by way of {origin!r}.",
                "Write the multiplier as a rate at the factor divided by the same rate at the"
                " reference.",
            )
    try:
        registered_law(law.name)
    except LawError:  # no recipe can hold it
        return
    read = law_from_dict(tomli.loads(tomli_w.dumps(law_to_dict(law))))
    if read != law:
        raise LawError(
            f"The law {law!r} is read back from TOML as {read!r}.",
            "Make it a frozen dataclass whose fields are numbers, texts, booleans or laws, all"
            " with defaults, and register it under its own name.",
        )
