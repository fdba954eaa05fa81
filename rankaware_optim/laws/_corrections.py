"""Corrections of another law: what a calibration or our own sweeps add to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .._optimizers import optimizer_family
from .._types import Factor, Reference
from ._base import FIRST, Law, check_law, check_parameters
from ._constant import Constant
from ._mua import MuA
from ._updates import FORMS

_ONE_RANK = 16


class _Around(Law):
    """A law that corrects another: what it does not say itself is the other's."""

    law: Law

    @property
    def falls_with_rank(self) -> bool:
        return self.law.falls_with_rank

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        return replace(self, law=self.law.bind(optimizer_class, settings))  # type: ignore[type-var]

    def batch_multiplier(self, ratio: float) -> float:
        return self.law.batch_multiplier(ratio)


@dataclass(frozen=True)
class Power(_Around):
    """A rank exponent and a full-finetuning factor on top of another law: what a calibration corrects the law by.

    multiplier = law · (r / r_ref)^exponent for LoRA; for full finetuning r stands for `pivot`, or for the fan-in
    where `to_full` continues the drift to r = n, and the result is times `full_factor`. So a drift that does not
    continue leaves full finetuning where the rank `pivot` puts it.
    """

    exponent: float = 0.0
    full_factor: float = 1.0
    pivot: float = 16.0
    to_full: bool = False
    law: Law = field(default_factory=MuA)
    name: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        check_parameters(self, "exponent", "full_factor", "pivot")
        check_law(self, self.law)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        here = self._correction(factor.role == "full", factor.rank, factor.fan_in)
        there = self._correction(reference.method == "full", reference.rank, reference.fan_in)
        return self.law.multiplier(factor, reference) * here / there

    def _correction(self, full: bool, rank: int | None, fan_in: float | None) -> float:
        if not full:
            return math.pow(rank or 1, self.exponent)
        rank_of_full = (fan_in or self.pivot) if self.to_full else self.pivot
        return self.full_factor * math.pow(rank_of_full, self.exponent)


@dataclass(frozen=True)
class OneRank(_Around):
    """Another law, asked as if every pair had rank 16: alpha, init, width and method move the rate, and rank does not.

    multiplier = law(16, s, n), with s the effective multiplier and n the fan-in, over the same at the reference.

    >>> at = Reference(rank=16, alpha=16, fan_in=4096)
    >>> OneRank().multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0), at)
    1.0
    """

    law: Law = field(default_factory=MuA)
    name: ClassVar[str] = "one-rank"

    def __post_init__(self) -> None:
        check_law(self, self.law)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        if factor.role != "full":
            factor = replace(factor, rank=_ONE_RANK)
        if reference.method == "lora":
            alpha = _ONE_RANK * reference.scaling
            reference = replace(reference, rank=_ONE_RANK, alpha=alpha, rslora=False)
        return self.law.multiplier(factor, reference)


@dataclass(frozen=True)
class Falling(Law):
    """Another law, with the fall in rank that best rates show at Init[B]. Around µA it is the default law.

    Init[B]   law · ((r₀ + n) / (r₀ + min(r, n)))^p;  Init[A] and full finetuning: the law alone

    with r₀ = `knee`, p = `power`, r the rank and n the fan-in, in the reference alike. So the rate falls as r^-p above
    r₀, and at r = n it is full finetuning's. The form is empirical: no theory fixes it, and the paper's law has none of
    it. An embedding, of width 1, does not fall. `coordinate_check`, which is of stability alone, does not see the fall.

    The fall is known for Adam's kind alone. Bound to an optimizer of another family it is the law beneath; in place of
    µA it is what did best there at Init[A] (benchmarks/results/law_check.md): µA's form for LAMB and Adafactor, the
    same at one rank for SGD and Muon (`OneRank`), one rate for LARS, which was not tried. law="mua" is µA's form.

    Source: leave-one-domain-out on the study of this project (benchmarks/results/init_b_forms.md), which names p = 1/3
    without a knee. Recipes from before `power` was a field have p = 1/2 and a knee of 4.

    >>> at = Reference(rank=16, alpha=16, init="B", fan_in=4096)
    >>> round(Falling().multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0, init="B"), at), 2)
    0.63
    """

    knee: float = field(default=0.0, metadata={FIRST: 4.0})
    power: float = field(default=1.0 / 3.0, metadata={FIRST: 0.5})
    law: Law = field(default_factory=MuA)
    name: ClassVar[str] = "falling"

    def __post_init__(self) -> None:
        check_parameters(self, "knee", "power")
        check_law(self, self.law)

    @property
    def falls_with_rank(self) -> bool:
        return True

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        law, family = self.law.bind(optimizer_class, settings), optimizer_family(optimizer_class, settings)
        if family in ("sign-like", "unknown"):
            return replace(self, law=law)
        by_default: dict[str, Law] = {"form": law, "one rank": OneRank(law), "one rate": Constant()}
        return by_default[FORMS[family].default] if isinstance(self.law, MuA) else law

    def batch_multiplier(self, ratio: float) -> float:
        return self.law.batch_multiplier(ratio)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        here = self._lift(factor.init if factor.role != "full" else "full", factor.rank, factor.fan_in)
        there = self._lift(reference.init if reference.method == "lora" else "full", reference.rank, reference.fan_in)
        return self.law.multiplier(factor, reference) * here / there

    def _lift(self, init: str, rank: int | None, fan_in: float | None) -> float:
        """How far above full finetuning's the rate at Init[B] lies."""
        if init != "B" or rank is None or fan_in is None:
            return 1.0
        return math.pow((self.knee + fan_in) / (self.knee + min(rank, fan_in)), self.power)
