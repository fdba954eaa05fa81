"""Laws that correct another law, with terms from a calibration or from this project's sweeps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .._checks import check_choice, shown
from .._optimizers import optimizer_family
from .._types import Factor, Reference
from ..errors import LawError
from ._law import Law, check_ranges
from ._mua import SIGN_LIKE, MuA


class Correction(Law):
    """Another law times a term at the factor, divided by the same term at the reference. Its other
    answers are the inner law's.
    """

    law: Law

    def __post_init__(self) -> None:
        if not isinstance(self.law, Law):
            raise LawError(
                f"The law {self.name!r} got law={shown(self.law)}.",
                "Give a Law instance, such as MuA().",
            )

    @property
    def family(self) -> str:
        """The family whose form the inner law has, if it has one."""
        return self.law.family  # type: ignore[attr-defined, no-any-return]

    @property
    def falls_with_rank(self) -> bool:
        return self.law.falls_with_rank

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        law = self.law.bind(optimizer_class, settings)
        return replace(self, law=law)  # type: ignore[type-var]

    def batch_multiplier(self, ratio: float) -> float:
        return self.law.batch_multiplier(ratio)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        move = self.term(factor) / self.term(reference.as_factor())
        return self.law.multiplier(factor, reference) * move

    @abstractmethod
    def term(self, at: Factor) -> float:
        """Return the correction of the rate at a configuration, up to a constant."""


@dataclass(frozen=True)
class Power(Correction):
    """Another law, corrected by a rank exponent and a factor for full finetuning. A calibration
    fits both::

        LoRA               multiplier = law · (r / r_ref)^exponent
        full finetuning    multiplier = law · (r_full / r_ref)^exponent · full_factor

    r_full is `pivot`, or the fan-in n if `to_full` is set. r_ref is the reference's rank. For a
    reference tuned by full finetuning, (r_ref)^exponent is replaced by (r_full)^exponent ·
    full_factor.

    Args:
        exponent: the drift, in octaves of rate per octave of rank.
        full_factor: factor of the full-finetuning rate, dimensionless.
        pivot: the rank at which the correction for full finetuning is evaluated.
        to_full: whether the drift continues to r = n for full finetuning.
        law: the law that is corrected.
    """

    exponent: float = 0.0
    full_factor: float = 1.0
    pivot: float = 16.0
    to_full: bool = False
    law: Law = field(default_factory=MuA)
    name: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "exponent", "full_factor", "pivot")
        check_choice(self.to_full, (True, False), "power takes as to_full", LawError)

    def term(self, at: Factor) -> float:
        if at.role != "full":
            return math.pow(at.rank or 1, self.exponent)
        rank = at.fan_in if self.to_full else self.pivot
        return self.full_factor * math.pow(rank, self.exponent)


@dataclass(frozen=True)
class Falling(Correction):
    """Another law, with rates that fall in rank where A starts at zero. Around `MuA` it
    is the default law::

        A = 0                       multiplier ∝ law · ((r₀ + n) / (r₀ + min(r, n)))^p
        B = 0, full finetuning      multiplier ∝ law

    r₀ = `knee`, p = `power`, r is the rank and n the fan-in. The reference is treated in the same
    way. Above r₀ the rate falls as r^-p. At r = n it equals the rate of full finetuning. The form
    is empirical: no theory gives it, and the paper's law does not contain it. The rate of an
    embedding, whose width is 1, does not fall.

    The fall applies to sign-like optimizers (Adam and its variants) and to unknown ones. Bound to
    an optimizer of another family, the result is the inner law, bound to that optimizer.

    Source: init_b_forms.md, of the frozen answers in benchmarks/README.md.

    Args:
        knee: r₀, the rank below which the rate hardly falls.
        power: p, the fall in octaves of rate per octave of rank.
        law: the law that is corrected.

    >>> at = Reference(rank=16, alpha=16, init="B", fan_in=4096)
    >>> round(Falling().multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0, init="B"), at), 2)
    0.63
    """

    knee: float = 0.0
    power: float = 1.0 / 3.0
    law: Law = field(default_factory=MuA)
    name: ClassVar[str] = "falling"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "knee", "power")

    @property
    def falls_with_rank(self) -> bool:
        return True

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        if optimizer_family(optimizer_class, settings) in SIGN_LIKE:
            return super().bind(optimizer_class, settings)
        return self.law.bind(optimizer_class, settings)

    def term(self, at: Factor) -> float:
        if at.role == "full" or at.init != "B" or at.rank is None:
            return 1.0
        lowest = min(at.rank, at.fan_in)
        return math.pow((self.knee + at.fan_in) / (self.knee + lowest), self.power)
