"""A law that this package had once. Recipes that hold it are read, and answer at their own reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .._types import Factor, Reference
from ..errors import LawError
from ._base import Law, check_parameters


@dataclass(frozen=True)
class Measured(Law):
    """The law of former recipes that ran a few steps of the optimizer which the file names. Nothing is run any more.

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
                "The law 'measured' is no longer part of this package, so its recipes have one rate.",
                "Calibrate again, or give the recipe's lr= and tuned_at= with another law=.",
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
