"""Corrections of another law: what a calibration or our own sweeps add to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .._optimizers import optimizer_family
from .._types import Factor, Reference
from ._base import Law, check_law, check_parameters
from ._mua import MuA


@dataclass(frozen=True)
class Power(Law):
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

    @property
    def falls_with_rank(self) -> bool:
        return self.law.falls_with_rank

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        return replace(self, law=self.law.bind(optimizer_class, settings))

    def batch_multiplier(self, ratio: float) -> float:
        return self.law.batch_multiplier(ratio)

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
class Falling(Law):
    """Another law, with the fall in rank that best rates show at Init[B]. Around µA it is the default law.

    Init[B]   law · √((r₀ + n) / (r₀ + min(r, n))), in the reference alike;  Init[A] and full finetuning: the law alone

    Flat up to r₀ = `knee`, then r^(-1/2), and at r = n full finetuning's. An empirical form: no theory fixes it, and
    the paper's law has none of it. It was measured with AdamW: bound to an optimizer of another family than Adam's it
    is the law alone. The knee was chosen by best rates on image generation, vision classification and two further small
    tasks, one an earlier sweep of SmolLM2. On four that did not choose it, language, GRPO, captioning and text
    classification, it is 0.28, 0.26, 0.38 and 0.33 octaves off (rms over ranks, about their mean), the law alone 0.73,
    1.05, 0.63 and 0.91; on our own sweep of SmolLM2 0.12 and 1.00 (benchmarks/results/init_b.md). Its level was not
    fitted: from Init[A] to Init[B] it was up to three octaves too high, to full finetuning up to two off (table (d) of
    benchmarks/README.md). That the rate at Init[B] goes as n^(-1/2), not n^(-1), was not tested, nor networks wider
    than SmolLM2 (layers of 576 and 1,536), nor runs of more than four hundred steps. An embedding, of width 1, does not
    fall. `coordinate_check`, which is of stability alone, calls the fall a failing. Freezing B left r^(-1/4) of it on
    the first two, all that vision has: so part of it is in A's own steps, and part, where there is more, in training B.

    >>> at = Reference(rank=16, alpha=16, init="B", fan_in=4096)
    >>> round(Falling().multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0, init="B"), at), 2)
    0.54
    """

    knee: float = 4.0
    law: Law = field(default_factory=MuA)
    name: ClassVar[str] = "falling"

    def __post_init__(self) -> None:
        check_parameters(self, "knee")
        check_law(self, self.law)

    @property
    def falls_with_rank(self) -> bool:
        return True

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        law, family = self.law.bind(optimizer_class, settings), optimizer_family(optimizer_class, settings)
        return replace(self, law=law) if family in ("sign-like", "unknown") else law

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
        return math.sqrt((self.knee + fan_in) / (self.knee + min(rank, fan_in)))
