"""Laws whose multipliers do not depend on the rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .._types import Factor, Reference
from ._base import Law, check_parameters


@dataclass(frozen=True)
class Constant(Law):
    """One rate for everything: multiplier 1."""

    name: ClassVar[str] = "constant"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return 1.0


@dataclass(frozen=True)
class LoRAPlus(Law):
    """LoRA+: B's rate is `ratio` times A's at every rank. Everything else has the base rate.

    η_A = η, η_B = ratio·η. Source: Hayou, Ghosh, Yu, "LoRA+" (ICML 2024), which recommends 16.

    Args:
        ratio: η_B / η_A, dimensionless.
    """

    ratio: float = 16.0
    name: ClassVar[str] = "loraplus"

    def __post_init__(self) -> None:
        check_parameters(self, "ratio")

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return self.ratio if factor.role == "B" else 1.0
