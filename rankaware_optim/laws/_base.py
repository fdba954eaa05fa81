"""Scaling laws: how the best learning rate moves with rank, scaling, init, width and method. Pure arithmetic, no torch.

A law answers one question, `Law.multiplier(factor, reference)`: by what number the rate tuned at `reference` is
multiplied for `factor`. Its base rate is that of the reference's A factor. Laws are frozen dataclasses whose
arguments all have defaults, so that they survive a round trip through a recipe's TOML.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

from .._registry import Registry
from .._types import Factor, Reference
from ..errors import LawError
from ._updates import FORMS, SHAPE_FACTORS, Site, Updates, kappa, known_family, optimizer_family, update_settings

__all__ = [
    "Constant",
    "DEFAULT_LAW",
    "Falling",
    "Law",
    "LoRAPlus",
    "MuA",
    "Power",
    "get_law",
    "kappa",
    "known_family",
    "law_words",
    "optimizer_family",
]

LAWS = Registry("rankaware_optim.laws", "law", LawError)
DEFAULT_LAW = "falling"


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

    @property
    def falls_with_rank(self) -> bool:
        """Whether Init[B]'s rates fall in rank beyond stability: a calibration then expects no further fall."""
        return False

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        """The law for this optimizer class and its settings; by default itself."""
        return self

    def batch_multiplier(self, ratio: float) -> float:
        """What every rate is multiplied by where the batch is `ratio` times the reference's; by default 1."""
        return 1.0

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
    """µA with finitely many effective tokens, in the form of the optimizer's family.

    The best rate is the largest at which a layer's output still moves by Θ(1). With τ = T·η over T steps, s the
    effective multiplier, r the rank, n the fan-in, b = `tokens` and λ = `ratio` = η_B / η_A, a sign-like optimizer
    (Adam and kin) has

        Init[A]   s·κ(r)·λ·τ·(1 + κ(n)·τ) = 1
        Init[B]   hypot(s·κ(n)·τ, s·κ(n)·κ(r)·λ·τ²) = 1
        full      κ(n)·τ = 1
        κ(m) = √(m + (2/π)·m²/b);  κ(m) = m for tokens=None, the paper's law

    κ(m) is the size of a sum of m sign terms that serves b independent tokens at once. Only ratios of τ are used, so
    neither T nor the right-hand side matters. tokens: effective and far below the tokens in a batch; published
    language-model sweeps ask for 8 to 16, small image models for 1 to 3.

    The other families' conditions stand in families.py, at `spectral_terms`, `gradient_rate`, `relative_rate` and
    `first_step_rate`; there a layer counts as square, since a reference states one width, and tokens=None as one
    token. `bind` sets `family`, `shape_factor` (Muon's) and `floor` (Adafactor's) by the optimizer; an unknown one is
    taken as sign-like. `steps` = T matters only where growth compounds (gradient-like, relative-scale): None is many
    small steps, as in training; the check takes four.

    split=True gives the two factors the rates at which each one's own share of the change is Θ(1): for sign-like
    updates η_A = σ/n and η_B = λ·σ/(s·r) under Init[A], η_A = σ/(s·n) and η_B = λ·σ/r under Init[B]. The base rate is
    that of the reference's A factor, and σ solves the condition above, in which s then cancels: a change of s is
    undone exactly, as it is in training.

    Source: Chen, Villar, Hayou, "Learning Rate Scaling across LoRA Ranks and Transfer to Full Finetuning" (ICML
    2026, arXiv 2602.06204); the finite-token κ, the families and the split are this project's extension, confirmed by
    `coordinate_check` (benchmarks/results/exponents.md).

    >>> paper, ours = MuA(tokens=None), MuA()
    >>> at = Reference(rank=16, alpha=16, fan_in=4096)
    >>> round(paper.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0), at), 2)  # about r^(-1/2)
    0.48
    >>> round(ours.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=0.25), at), 2)  # alpha kept: the rate rises
    1.11
    """

    tokens: float | None = 8.0
    ratio: float = 1.0
    split: bool = False
    family: str = "sign-like"
    shape_factor: str = "original"
    floor: float | None = None
    steps: int | None = None
    name: ClassVar[str] = "mua"

    def __post_init__(self) -> None:
        _check_parameter(self, "ratio", self.ratio)
        for name in ("tokens", "floor", "steps"):
            if getattr(self, name) is not None:
                _check_parameter(self, name, getattr(self, name))
        _check_choice(self, "split", self.split, (False, True))
        _check_choice(self, "family", self.family, tuple(FORMS))
        _check_choice(self, "shape_factor", self.shape_factor, tuple(SHAPE_FACTORS))
        if self.split and FORMS[self.family].units is None:
            raise LawError(f"Two rates are not derived for {self.family} optimizers.", "Leave split=True out.")

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        return replace(self, **update_settings(optimizer_class, settings))

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        init = "full" if factor.role == "full" else "B" if factor.init == "B" else "A"
        rate_a, rate_b = self._rates(init, factor.rank, factor.scaling, factor.fan_in)
        origin = "full" if reference.method == "full" else reference.init
        base, _ = self._rates(origin, reference.rank, reference.scaling, reference.fan_in)
        return (rate_b if factor.role == "B" else rate_a) / base

    def batch_multiplier(self, ratio: float) -> float:
        return float(ratio ** FORMS[self.family].batch)

    def sigma(self, init: str, rank: int, scaling: float, fan_in: float) -> float:
        """σ, the shared rate, that meets the family's condition at T = 1, in absolute terms: rough, a first guess."""
        return self._rates(init, rank, scaling, fan_in)[0]

    def _rates(self, init: str, rank: int | None, scaling: float, fan_in: float | None) -> tuple[float, float]:
        """η_A and η_B that meet the family's condition at T = 1; a whole weight's rate stands for both."""
        if fan_in is None or (rank is None and init != "full"):
            raise LawError(
                "The reference was not resolved: it lacks its fan-in or its rank.",
                "Call reference.resolve(survey), or give fan_in=.",
            )
        site, form = Site(init, rank or 1, scaling, fan_in), FORMS[self.family]
        of = Updates(self.tokens, self.shape_factor, self.floor, self.steps)
        unit_a, unit_b = form.units(of, site) if self.split and form.units and init != "full" else (1.0, 1.0)
        sigma = form.rate(of, site, unit_a, unit_b * self.ratio)
        return unit_a * sigma, unit_b * sigma * self.ratio


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
        _check_law(self, self.law)

    @property
    def falls_with_rank(self) -> bool:
        return self.law.falls_with_rank

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        law = self.law.bind(optimizer_class, settings)
        return Power(self.exponent, self.full_factor, self.pivot, self.to_full, law)

    def batch_multiplier(self, ratio: float) -> float:
        return self.law.batch_multiplier(ratio)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        here = self._correction(factor.role == "full", factor.rank, factor.fan_in)
        there = self._correction(reference.method == "full", reference.rank, reference.fan_in)
        return self.law.multiplier(factor, reference) * here / there

    def _correction(self, full: bool, rank: int | None, fan_in: float | None) -> float:
        if not full:
            return float((rank or 1) ** self.exponent)
        rank_of_full = (fan_in or self.pivot) if self.to_full else self.pivot
        return float(self.full_factor * rank_of_full**self.exponent)


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
        _check_parameter(self, "knee", self.knee)
        _check_law(self, self.law)

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


def get_law(law: str | Law) -> Law:
    """A law by its name, such as "mua", "mua-paper", "falling" or "constant", a plug-in's too, or the one given."""
    if isinstance(law, Law):
        return law
    if not isinstance(law, str):
        raise LawError(f"A law is a name or a Law instance, not {law!r}.", f"Known are {', '.join(LAWS.names())}.")
    made = LAWS.get(law)()
    if not isinstance(made, Law):
        raise LawError(f"The law {law!r} made a {type(made).__name__}.", "Let its factory return a Law instance.")
    return made


def law_changes(law: Law) -> dict[str, Any]:
    """A law's name and what differs from its defaults, which is what recipes are hashed by.

    Laws within are always named, so a parameter that a later version adds changes nothing.
    """
    told = {name: value for name, value, changed in _parameters(law) if changed or isinstance(value, Law)}
    return {"name": law.name, **{k: law_changes(v) if isinstance(v, Law) else v for k, v in told.items()}}


def law_words(law: Law) -> str:
    """A law by its class and what differs from its defaults, to four digits: "MuA(tokens=4.0)"."""
    told = {name: value for name, value, changed in _parameters(law) if changed}
    return f"{type(law).__name__}({', '.join(f'{name}={_in_words(value)}' for name, value in told.items())})"


def _parameters(law: Law) -> Iterator[tuple[str, Any, bool]]:
    """A law's parameters: name, value, and whether it differs from its default."""
    known: tuple[Field[Any], ...] = fields(law) if is_dataclass(law) else ()
    for f in known:
        value = getattr(law, f.name)
        yield f.name, value, value != (f.default_factory() if callable(f.default_factory) else f.default)


def _in_words(value: Any) -> str:
    if isinstance(value, Law):
        return law_words(value)
    return repr(float(f"{value:.4g}") if isinstance(value, float) else value)


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


def _check_law(law: Law, beneath: object) -> None:
    if not isinstance(beneath, Law):
        raise LawError(f"The law {law.name!r} got law={beneath!r}.", "Give a Law instance, such as MuA().")


def _check_choice(law: Law, name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        known = ", ".join(map(repr, choices))
        raise LawError(f"The law {law.name!r} got {name}={value!r}.", f"Give one of {known}.")


LAWS.register("mua", MuA)
LAWS.register("mua-paper", lambda: MuA(tokens=None))
LAWS.register("constant", Constant)
LAWS.register("loraplus", LoRAPlus)
LAWS.register("power", Power)
LAWS.register("falling", Falling)
