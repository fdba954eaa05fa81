"""Laws and fields that this package had once, and that recipes still hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .._checks import shown
from .._types import Factor, Reference
from ..errors import LawError
from ._base import Law, check_parameters

_GONE = {
    "split": False,
    "floor": "none",
    "steps": "none",
}  # fields that µA had, and their only readable values
_AT_ONE_RANK = (
    "gradient-like",
    "spectral",
)  # families whose rates moved with the rank unless "one-rank" held them


@dataclass(frozen=True)
class Measured(Law):
    """The law of former recipes that ran a few steps of the optimizer which the file names. Nothing
    is run any more.

    Its parameters are kept as they were, so that the recipe's hash stays.
    """

    tokens: int = 8
    steps: int = 16
    seed: int = 0
    target: float = 1.0
    ratio: float = 1.0
    optimizer: str = "torch.optim.adamw:AdamW"
    settings: str = "{}"
    name: ClassVar[str] = "measured"

    def __post_init__(self) -> None:
        check_parameters(self, "ratio")

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        if not _is_at(factor, reference):
            raise LawError(
                "The law 'measured' is no longer part of this package, so its recipes have one"
                " rate.",
                "Calibrate again, or pass law= with the recipe's lr= and tuned_at=.",
            )
        return self.ratio if factor.role == "B" else 1.0


def _is_at(factor: Factor, reference: Reference) -> bool:
    """Return whether a factor has the reference's configuration."""
    full = reference.method == "full"
    if full != (factor.role == "full"):
        return False
    numbers = [(factor.fan_in, reference.fan_in or factor.fan_in)]
    if not full:
        numbers += [(factor.rank or 0, reference.rank or 0), (factor.scaling, reference.scaling)]
    same_init = full or (factor.init == "B") == (reference.init == "B")
    return same_init and all(math.isclose(here, there, rel_tol=1e-6) for here, there in numbers)


def in_todays_fields(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a law's table with today's names and fields, and with the same rates. Today's tables
    are unchanged.

    Raises:
        LawError: today's laws give other rates.
    """
    if data.get("name") == "one-rank":
        inner = data.get("law")
        if (
            isinstance(inner, Mapping)
            and inner.get("name") == "mua"
            and inner.get("family") in _AT_ONE_RANK
        ):
            return _without_gone(inner)
        raise _gone("'one-rank' around that law")
    if data.get("name") != "mua" or _GONE.keys().isdisjoint(data):
        return data
    if data.get("family") in (*_AT_ONE_RANK, "first-step"):
        raise _gone(f"µA's terms of the rank for {data['family']} optimizers")
    return _without_gone(data)


def _without_gone(table: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in _GONE.items():
        if table.get(name, value) != value:
            raise _gone(f"'mua' with {name}={shown(table[name])}")
    return {name: value for name, value in table.items() if name not in _GONE}


def _gone(what: str) -> LawError:
    return LawError(
        f"This recipe was made by a law that is gone: {what}.",
        "Calibrate again, or pass law= with the recipe's lr= and tuned_at=.",
    )
