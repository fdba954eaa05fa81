"""Scaling laws: how the best learning rate moves with rank, scaling, init, width and method. Pure arithmetic, no torch.

A law answers one question, `Law.multiplier(factor, reference)`: by what number the rate tuned at `reference` is
multiplied for `factor`. Its base rate is that of the reference's A factor. Laws are frozen dataclasses whose
arguments all have defaults, so that they survive a round trip through a recipe's TOML.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from .adapters import Factor, Reference
from .errors import LawError
from .plugins import Registry

__all__ = ["Constant", "Law", "LoRAPlus", "MuA", "Power", "get_law", "kappa", "optimizer_family"]

LAWS = Registry("rankaware_optim.laws", "law", LawError)


class Law(ABC):
    """A scaling law. Subclass it as a frozen dataclass, give every field a default, and write `multiplier`.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class InverseRank(Law):
    ...     name = "inverse-rank"
    ...     def multiplier(self, factor, reference):
    ...         return reference.rank / factor.rank if factor.rank and reference.rank else 1.0
    >>> InverseRank().multiplier(Factor("w", "A", 32, 64, 64), Reference(rank=16, alpha=16, fan_in=64))
    0.5
    """

    name: ClassVar[str] = ""

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        """The law for this optimizer class and its settings; by default itself."""
        return self

    @abstractmethod
    def multiplier(self, factor: Factor, reference: Reference) -> float:
        """Ratio of `factor`'s rate to the base rate of a resolved `reference`: dimensionless, positive, finite."""


@dataclass(frozen=True)
class Constant(Law):
    """One rate for everything: multiplier 1."""

    name: ClassVar[str] = "constant"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return 1.0


@dataclass(frozen=True)
class LoRAPlus(Law):
    """LoRA+: B learns `ratio` times as fast as A, at every rank; all else at the base rate.

    η_A = η, η_B = ratio·η. Source: Hayou, Ghosh, Yu, "LoRA+" (ICML 2024), which recommends 16.
    """

    ratio: float = 16.0
    name: ClassVar[str] = "loraplus"

    def __post_init__(self) -> None:
        _check_parameter(self, "ratio", self.ratio)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return self.ratio if factor.role == "B" else 1.0


@dataclass(frozen=True)
class MuA(Law):
    """µA for sign-like updates (Adam and kin), with finitely many effective tokens: the default law.

    The best rate is the largest at which a layer's output still moves by Θ(1). With τ = T·η over T steps, s the
    effective multiplier, r the rank, n the fan-in and λ = `ratio` = η_B / η_A,

        Init[A]   s·κ(r)·λ·τ·(1 + κ(n)·τ) = 1
        Init[B]   hypot(s·κ(n)·τ, s·κ(n)·κ(r)·λ·τ²) = 1
        full      κ(n)·τ = 1
        κ(m) = √(m + (2/π)·m²/b),  b = `tokens`;  κ(m) = m for tokens=None, the paper's law

    κ(m) is the size of a sum of m sign terms that serves b independent tokens at once. Only ratios of τ are used, so
    neither T nor the right-hand side matters. tokens: effective and far below the tokens in a batch; published
    language-model sweeps ask for 8 to 16, small image models for 1 to 3.

    Source: Chen, Villar, Hayou, "Learning Rate Scaling across LoRA Ranks and Transfer to Full Finetuning" (ICML
    2026, arXiv 2602.06204); the finite-token κ is this project's extension.

    >>> paper, ours = MuA(tokens=None), MuA()
    >>> at = Reference(rank=16, alpha=16, fan_in=4096)
    >>> round(paper.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0), at), 2)  # about r^(-1/2)
    0.48
    >>> round(ours.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=0.25), at), 2)  # alpha kept: the rate rises
    1.11
    """

    tokens: float | None = 8.0
    ratio: float = 1.0
    name: ClassVar[str] = "mua"

    def __post_init__(self) -> None:
        if self.tokens is not None:
            _check_parameter(self, "tokens", self.tokens)
        _check_parameter(self, "ratio", self.ratio)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        init = "full" if factor.role == "full" else "B" if factor.init == "B" else "A"
        here = self._tau(init, factor.rank, factor.scaling, factor.fan_in)
        origin = "full" if reference.method == "full" else reference.init
        there = self._tau(origin, reference.rank, reference.scaling, reference.fan_in)
        return here / there * (self.ratio if factor.role == "B" else 1.0)

    def _tau(self, init: str, rank: int | None, scaling: float, fan_in: float | None) -> float:
        """The root τ of the condition in the class's docstring, in closed form."""
        if fan_in is None or (rank is None and init != "full"):
            raise LawError(
                "The reference was not resolved: it lacks its fan-in or its rank.",
                "Call reference.resolve(survey), or give fan_in=.",
            )
        k_n = kappa(fan_in, self.tokens)
        if init == "full":
            return 1.0 / k_n
        k_r = kappa(rank or 1, self.tokens) * self.ratio
        if init == "A":
            return 2.0 / (scaling * k_r * (1.0 + math.sqrt(1.0 + 4.0 * k_n / (scaling * k_r))))
        p = (scaling * k_n) ** 2
        return math.sqrt(2.0 / (p + math.sqrt(p * p + 4.0 * p * k_r**2)))


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
        _check_parameter(self, "exponent", self.exponent, positive=False)
        _check_parameter(self, "full_factor", self.full_factor)
        _check_parameter(self, "pivot", self.pivot)
        if not isinstance(self.law, Law):
            raise LawError(f"The law {self.name!r} got law={self.law!r}.", "Give a Law instance, such as MuA().")

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        law = self.law.bind(optimizer_class, settings)
        return Power(self.exponent, self.full_factor, self.pivot, self.to_full, law)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        here = self._correction(factor.role == "full", factor.rank, factor.fan_in)
        there = self._correction(reference.method == "full", reference.rank, reference.fan_in)
        return self.law.multiplier(factor, reference) * here / there

    def _correction(self, full: bool, rank: int | None, fan_in: float | None) -> float:
        if not full:
            return float((rank or 1) ** self.exponent)
        rank_of_full = (fan_in or self.pivot) if self.to_full else self.pivot
        return float(self.full_factor * rank_of_full**self.exponent)


def kappa(m: float, tokens: float | None) -> float:
    """Size of a sum of m sign terms serving b = `tokens` independent tokens: √(m + (2/π)·m²/b); m where b is None.

    >>> kappa(64, None)
    64.0
    >>> round(kappa(64, 8.0), 2)
    19.75
    """
    return float(m) if tokens is None else math.sqrt(m + (2.0 / math.pi) * m * m / tokens)


def get_law(law: str | Law) -> Law:
    """A law by name ("mua", "mua-paper", "constant", "loraplus", "power", or a plug-in's), or the instance given."""
    if isinstance(law, Law):
        return law
    if not isinstance(law, str):
        raise LawError(f"A law is a name or a Law instance, not {law!r}.", f"Known are {', '.join(LAWS.names())}.")
    made = LAWS.get(law)()
    if not isinstance(made, Law):
        raise LawError(f"The law {law!r} made a {type(made).__name__}.", "Let its factory return a Law instance.")
    return made


def checked_multiplier(law: Law, factor: Factor, reference: Reference) -> float:
    """`law.multiplier(factor, reference)`, or a `LawError` where it is not a positive finite number.

    Rounding noise about 1 is 1, so that the reference's own configuration changes nothing, bit for bit.
    """
    value = law.multiplier(factor, reference)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise LawError(
            f"The law {law!r} gave {value!r} as the multiplier of {factor.name or factor.role}.",
            "A multiplier is a positive finite number: mend the law, or choose another by law=.",
        )
    return 1.0 if math.isclose(value, 1.0, rel_tol=1e-12) else float(value)


def law_to_dict(law: Law) -> dict[str, Any]:
    """A law as plain TOML values: its registered name and its fields; None is written "none"."""
    if LAWS.get(law.name)().__class__ is not type(law):
        raise LawError(f"The law {law!r} is not the one registered as {law.name!r}.", "Register it under its own name.")
    values = {f.name: getattr(law, f.name) for f in fields(law)}  # type: ignore[arg-type]
    return {"name": law.name, **{key: _to_plain(value) for key, value in values.items()}}


def law_from_dict(data: Mapping[str, Any]) -> Law:
    """The inverse of `law_to_dict`; an error names an unknown law or field."""
    values = {key: _from_plain(value) for key, value in data.items() if key != "name"}
    kind = type(LAWS.get(str(data.get("name")))())
    unknown = sorted(values.keys() - {f.name for f in fields(kind)})
    if unknown:
        raise LawError(f"The law {kind.name!r} has no parameter {unknown[0]!r}.", "Remove it, or update the package.")
    made: Law = kind(**values)
    return made


def _to_plain(value: Any) -> Any:
    return law_to_dict(value) if isinstance(value, Law) else "none" if value is None else value


def _from_plain(value: Any) -> Any:
    return law_from_dict(value) if isinstance(value, Mapping) else None if value == "none" else value


def _check_parameter(law: Law, name: str, value: object, *, positive: bool = True) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not number or (positive and value <= 0):  # type: ignore[operator]
        kind = "positive finite" if positive else "finite"
        raise LawError(f"The law {law.name!r} got {name}={value!r}.", f"Give a {kind} number.")


# Class names by family, lower case: what a law may be derived for. Anything else is "unknown".
_FAMILIES = {
    "sign-like": """adam adamw nadam radam adamax sparseadam rmsprop rprop lion adabelief adabound adamod adamp
        diffgrad yogi qhadam adam8bit adamw8bit adamw4bit adamwfp8 adamwschedulefree nadamw madgrad ranger adan""",
    "gradient-like": "sgd asgd sgdw sgdp sgd8bit accsgd aggmo qhm pid sgdschedulefree",
    "spectral": "muon",
    "relative-scale": "lamb lars adafactor",
}
_FAMILY_OF = {name: family for family, names in _FAMILIES.items() for name in names.split()}


def optimizer_family(optimizer_class: type) -> str:
    """How an optimizer's step scales: "sign-like", "gradient-like", "spectral", "relative-scale" or "unknown"."""
    names = (base.__name__.lower() for base in optimizer_class.__mro__)
    return next((_FAMILY_OF[name] for name in names if name in _FAMILY_OF), "unknown")


LAWS.register("mua", MuA)
LAWS.register("mua-paper", lambda: MuA(tokens=None))
LAWS.register("constant", Constant)
LAWS.register("loraplus", LoRAPlus)
LAWS.register("power", Power)
