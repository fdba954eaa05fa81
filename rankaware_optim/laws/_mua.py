"""µA, the law of stable feature updates, in the form of each family of optimizers, and the laws
that correct it, with terms from a calibration or from this project's sweeps.

Each family has a function. It returns the σ at which the rate η = σ of both factors moves a layer's
output by 1 in T = 1, for the init "A" (B starts at zero), "B" (A starts at zero) or "full". s is
the scaling, r the rank, n the fan-in, b the number of tokens, and `shape` the name of Muon's shape
factor. τ = T·η.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

from .._checks import check_choice, shown
from .._optimizers import RANK_AWARE, in_force, optimizer_family
from .._types import Factor, Reference
from ..errors import LawError
from ._law import Constant, Law, check_ranges

_ONE_RANK = (
    16  # of forms that do not follow the rank: the middle of the ranks tried, laws.md
)
# Families with the sign-like form. An unknown optimizer counts as one.
SIGN_LIKE = ("sign-like", "unknown")


@dataclass(frozen=True)
class MuA(Law):
    """µA with a finite number of effective tokens, in the form of the optimizer's family.

    The best rate is the largest at which a layer's output still moves by Θ(1). Let τ = T·η over T
    steps, s be the scaling, r the rank, n the fan-in and b = `tokens`. B = 0 means that B starts at
    zero and A is drawn, as in PEFT. A = 0 is the reverse. For a sign-like optimizer (Adam and its
    variants)::

        B = 0     s·κ(r)·τ·(1 + κ(n)·τ) = 1
        A = 0     hypot(s·κ(n)·τ, s·κ(n)·κ(r)·τ²) = 1
        full      κ(n)·τ = 1
        κ(m) = √(m + (2/π)·m²/b);  κ(m) = m for tokens=None, the paper's law

    κ(m) is the size of a sum of m sign terms that serves b independent tokens at once. Only ratios
    of τ are used, so neither T nor the right-hand side matters.

    The conditions of Muon, SGD and LAMB are in laws/_mua.py: `spectral_rate`, `gradient_rate`
    and `relative_rate`. For them a layer is square, since a reference states one width, and
    tokens=None means one token. Those of Muon and SGD are evaluated at rank 16 for every pair:
    alpha, init, width and method move the rate, the rank does not. Bound to Adafactor or LARS, for
    which no form is known to hold, the law becomes `Constant`.

    Source: Chen, Villar, Hayou, "Learning Rate Scaling across LoRA Ranks and Transfer to Full
    Finetuning" (ICML 2026, arXiv 2602.06204). The finite-token κ and the other families are
    extensions by this project.

    Args:
        tokens: b, the effective number of independent tokens, far below the tokens in a batch; None
            for the paper's law. "family", the default, is the number of the optimizer's family: 2
            for sign-like optimizers, 8 for Muon, SGD and LAMB. A number stays whatever the
            optimizer.
        family: the optimizer's family, set by `bind`. An unknown optimizer counts as sign-like.
        shape_factor: Muon's `adjust_lr_fn`, or what stands for it, set by `bind`.

    >>> paper, ours = MuA(tokens=None), MuA()
    >>> at = Reference(rank=16, alpha=16, fan_in=4096)
    >>> more, kept = (Factor("w", "A", 64, 4096, 4096, scaling=s) for s in (1.0, 0.25))
    >>> round(paper.multiplier(more, at), 2)  # about r^(-1/2)
    0.48
    >>> round(ours.multiplier(kept, at), 2)  # alpha kept: it hardly moves
    1.03
    """

    tokens: float | Literal["family"] | None = "family"
    family: str = "sign-like"
    shape_factor: str = "original"
    name: ClassVar[str] = "mua"

    def __post_init__(self) -> None:
        check_choice(self.family, FORMS, "mua takes as family", LawError)
        shapes = SHAPE_FACTORS
        what = "mua takes as shape_factor"
        check_choice(self.shape_factor, shapes, what, LawError)
        if self.tokens not in (None, "family"):
            check_ranges(self, "tokens")

    @property
    def effective_tokens(self) -> float | None:
        """b as a number, that of the family unless it was given; None for the paper's law."""
        if self.tokens == "family":
            return FORMS[self.family].tokens
        return self.tokens

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        family = optimizer_family(optimizer_class, settings)
        if family not in FORMS:
            return Constant()
        given = in_force(optimizer_class, settings)
        matched = any(map(given.get, _MATCHED))
        shape_factor = given.get("adjust_lr_fn") or (
            "match_rms_adamw" if matched else "original"
        )
        return replace(self, family=family, shape_factor=shape_factor)

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        if reference.fan_in is None:
            raise LawError(
                "The reference was not resolved: it lacks its fan-in.",
                "Call reference.resolve(survey), or give fan_in=.",
            )
        return self.sigma(factor) / self.sigma(reference.as_factor())

    def batch_multiplier(self, ratio: float) -> float:
        return float(ratio ** FORMS[self.family].batch)

    def sigma(self, at: Factor) -> float:
        """Return the rate that meets the family's condition at T = 1. As an absolute rate it is
        only a first guess.
        """
        form = FORMS[self.family]
        return form.rate(
            "full" if at.role == "full" else "B" if at.init == "B" else "A",
            r=_ONE_RANK if form.one_rank else at.rank or 1,
            s=at.scaling,
            n=at.fan_in,
            b=self.effective_tokens,
            shape=self.shape_factor,
        )


# --- sign-like updates ----------------------------------------------------------------------------


def kappa(m: float, b: float | None) -> float:
    """Return the size of a sum of m sign terms that serves b tokens: √(m + (2/π)·m²/b), or m for
    None.

    >>> kappa(64, None), round(kappa(64, 8.0), 2)
    (64.0, 19.75)
    """
    return float(m) if b is None else math.sqrt(m + 2.0 / math.pi * m * m / b)


def sign_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str = ""
) -> float:
    """Return σ for sign-like updates (Adam), whose entries all have size η.

    With B = 0 the term s·ΔB·A₀·x has size s·κ(r)·η. With A = 0 the term s·B₀·ΔA·x has size
    s·κ(n)·η. In both, s·ΔB·ΔA·x has size s·κ(r)·κ(n)·η²::

        B = 0     p·σ + q·σ² = 1          p = s·κ(r)
        A = 0     hypot(p·σ, q·σ²) = 1    p = s·κ(n)       q = s·κ(r)·κ(n)
        full      κ(n)·σ = 1
    """
    k_r = kappa(r, b)
    k_n = kappa(n, b)
    if init == "full":
        return 1.0 / k_n
    p = s * k_r if init == "A" else s * k_n
    return root(init, p, s * k_r * k_n)


def root(init: str, p: float, q: float) -> float:
    """Return the root σ of p·σ + q·σ² = 1. With A = 0 the terms are nearly orthogonal and add in
    quadrature: hypot(p·σ, q·σ²) = 1.
    """
    if init == "B":
        return math.sqrt(2.0 / (p * p + math.sqrt(p**4 + 4.0 * q * q)))
    return 2.0 / (p + math.sqrt(p * p + 4.0 * q))


# --- spectral updates -----------------------------------------------------------------------------

# Muon's shape factor of a (rows, cols) update, by the names of adjust_lr_fn in torch and timm.
SHAPE_FACTORS: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "rms_to_rms": lambda rows, cols: math.sqrt(rows / cols),
    "rsqrt_in": lambda rows, cols: 1.0 / math.sqrt(cols),
}
# Settings that stand for "match_rms_adamw": pytorch_optimizer's and adv_optm's.
_MATCHED = ("use_adjusted_lr", "rms_rescaling")


def spectral_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return σ for spectral updates (Muon): a polar factor, all singular values 1, times a shape
    factor a. The change is p·η + q·η².

    An update P of B has rank min(r, b) and spans the features A·x. It keeps their norm: |P·A₀·x| =
    √r per token, an rms of √(r/n) over n outputs. An update of A spans r of the at most n
    directions of the b tokens. It keeps a norm of m·√n out of √n, with m = √min(1, r/b + r/n). B₀,
    with entries of variance 1/r, turns a norm ν into the rms ν·√(1/n + 1/r). Hence

        B = 0     p = s·a_B·√(r/n)              q = s·a_A·a_B·m
        A = 0     p = s·a_A·√n·√(1/n + 1/r)·m   q as above
        full      p = a
    """
    shape_factor = SHAPE_FACTORS[shape]
    if init == "full":
        return 1.0 / shape_factor(n, n)
    a_a = shape_factor(r, n)
    a_b = shape_factor(n, r)
    m = math.sqrt(min(1.0, r / (b or 1.0) + r / n))
    q = s * a_a * a_b * m
    if init == "A":
        return root(init, s * a_b * math.sqrt(r / n), q)
    return root(init, s * a_a * math.sqrt(1.0 + n / r) * m, q)


# --- gradient-like updates ------------------------------------------------------------------------


def gradient_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return σ for gradient-like updates (SGD), whose growth compounds. The output gradient g is
    held fixed.

    With G = g·xᵀ, ΔA = −η·s·Bᵀ·G and ΔB = −η·s·G·Aᵀ are linear in (A, B). Take a singular pair (u,
    v) of G with value g₀. Along it A·v and Bᵀ·u mix by cosh φ and sinh φ, with φ = s·g₀·T·η for
    many small steps. G has k = min(b, n) pairs, with g₀² = n² + 2·b·n (the power-weighted mean for
    independent tokens). With z = sinh²φ,

        B = 0     s²·z·(1 + z)·r·(r + k + 1)/n² = 1
        A = 0     s²·z·((1 + z)·(1 + (k + 1)/r) + max(n − k, 0)/r) = 1
        full      τ·√n·√(n + b) = 1 (one step: nothing compounds)
    """
    b = b or 1.0
    if init == "full":
        return 1.0 / math.sqrt(n * (n + b))
    k = min(b, n)
    if init == "A":
        both = single = s * math.sqrt(r * (r + k + 1.0)) / n
    else:
        both = s * math.sqrt(1.0 + (k + 1.0) / r)
        single = math.hypot(both, s * math.sqrt((n - k) / r))
    phi = math.asinh(root("B", single, both))
    return phi / (s * math.sqrt(n * n + 2.0 * b * n))


# --- relative-scale updates -----------------------------------------------------------------------


def relative_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return σ for relative-scale updates (LAMB): sign-like directions in units of the factor's own
    rms.

    A factor drawn with rms ρ moves by Δ, orthogonal to its start: dΔ/dτ = √(ρ² + Δ²), so Δ = ρ·sinh
    τ. A factor that starts at zero first takes one step of plain η = τ/4 and grows from there, to
    z(τ) = τ/4·e^(τ − τ/4). With ρ_A = 1/√n where B = 0 and ρ_B = 1/√r where A = 0,

        B = 0     s·κ(r)·z(τ)·(1 + κ(n)·sinh(τ)/√n) = 1
        A = 0     hypot(s·κ(n)·z(τ), s·κ(n)·κ(r)·z(τ)·sinh(τ)/√r) = 1
        full      κ(n)·sinh(τ)/√n = 1

    The rising side meets 1 by bisection. LAMB's cap on the weights' norm is left out.
    """
    k_n = kappa(n, b)
    k_r = kappa(r, b)
    if init == "full":
        return math.asinh(math.sqrt(n) / k_n)

    low = -700.0
    high = math.log(50.0)
    for _ in range(64):
        middle = (low + high) / 2
        tau = math.exp(middle)
        grown = s * tau / 4 * math.exp(tau - tau / 4)
        if init == "A":
            change = k_r * grown * (1.0 + k_n * math.sinh(tau) / math.sqrt(n))
        else:
            change = k_n * grown * math.hypot(1.0, k_r * math.sinh(tau) / math.sqrt(r))
        low, high = (middle, high) if change < 1.0 else (low, middle)
    return math.exp(high)


# --- the table of families ------------------------------------------------------------------------


class Form(NamedTuple):
    """A family's condition.

    rate: σ, from init, r, s, n, b and shape.

    words: what a report says an optimizer is, and of the evidence only what was measured.

    one_rank: whether every pair is evaluated at rank 16. Small runs of SGD and Muon followed the
    form with alpha but not with the rank (benchmarks/results/laws.md).

    batch: the exponent of the best rate in the batch size. It is 1/2 for updates that do not grow
    with the gradient (Malladi et al., arXiv 2205.10287), and 1 for those that do (Goyal et al.,
    arXiv 1706.02677). For spectral and relative-scale updates 1/2 is an assumption without a
    source.

    tokens: b of a law that has its family's number. That of sign-like optimizers was chosen after a
    look at all runs on file (benchmarks/answers.md). The other forms were judged
    with 8.
    """

    rate: Callable[..., float]
    words: str
    one_rank: bool = False
    batch: float = 0.5
    tokens: float = 8.0


_BY_ALPHA = (
    "{}: in small runs of {} the best rate followed µA's form with alpha but not with rank, so its"
    " rates do the same"
)
_UNKNOWN = "of an unknown family and is scaled as a sign-like optimizer, such as Adam"
FORMS = {
    "sign-like": Form(sign_rate, "sign-like", tokens=2.0),
    "unknown": Form(sign_rate, _UNKNOWN, tokens=2.0),
    "spectral": Form(
        spectral_rate, _BY_ALPHA.format("spectral", "Muon"), one_rank=True
    ),
    "gradient-like": Form(
        gradient_rate,
        _BY_ALPHA.format("gradient-like", "SGD"),
        one_rank=True,
        batch=1.0,
    ),
    "relative-scale": Form(
        relative_rate,
        "relative-scale: µA's form for that family moves its rates, derived for square layers; in"
        " small runs with alpha = rank it was nearer than one rate",
    ),
}
_NO_FORM = (
    "{}: no form of µA is known to hold for that family, so all ranks have one rate"
)
# Families without a form, and what a report says of them.
ONE_RATE = {
    RANK_AWARE: f"{RANK_AWARE}: by its own rule its updates move with the rank, so all ranks keep"
    " one rate",
    "floored-scale": _NO_FORM.format("floored-scale"),
    "first-step": _NO_FORM.format("first-step"),
}


# --- corrections of a law -------------------------------------------------------------------------


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
    def family(self) -> str | None:
        return self.law.family

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


def layers_of(law: Law) -> Iterator[Law]:
    """Yield a law, then the law that it corrects, and so on to the innermost one."""
    yield law
    while isinstance(law, Correction):
        law = law.law
        yield law


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

    Source: init_b_forms.md in benchmarks/answers.md.

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

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        if optimizer_family(optimizer_class, settings) in SIGN_LIKE:
            return super().bind(optimizer_class, settings)
        return self.law.bind(optimizer_class, settings)

    def term(self, at: Factor) -> float:
        if at.role == "full" or at.init != "B" or at.rank is None:
            return 1.0
        lowest = min(at.rank, at.fan_in)
        return math.pow((self.knee + at.fan_in) / (self.knee + lowest), self.power)
