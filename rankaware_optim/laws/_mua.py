"""The scaling law µA, in one form for each family of optimizers, and laws that correct it.

µA (Chen, Villar, Hayou) asks for stable feature updates: the best learning rate is the largest at
which the output of a layer still changes by Θ(1), however large the rank and the width are. To use
it one needs to know how far an optimizer moves the output, and that differs between families: every
entry of an Adam update has about the size of the learning rate, a Muon update is orthogonal, an SGD
update is the gradient itself.

So each family has a function here: `sign_rate` (Adam), `spectral_rate` (Muon), `gradient_rate`
(SGD) and `relative_rate` (LAMB). It writes the change of the output as a function of the learning
rate, sets the change to 1, and returns the solution σ. An absolute σ means little, because
constants are left out. The ratio of two of them is the multiplier of a learning rate.

The symbols: W + s·B·A is the adapted weight, s the scaling, r the rank, n the fan-in of the layer,
b the effective number of independent tokens, T the number of steps, η the learning rate and τ =
T·η. The init is "A" if A was drawn and B starts at zero (written B = 0), "B" if A starts at zero (A
= 0), or "full" for a whole weight. `shape` is the name of Muon's shape factor.
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

# The rank at which a form is evaluated that does not follow the rank: the middle of the ranks tried
# (benchmarks/results/laws.md).
_ONE_RANK = 16
# Families with the form for Adam. An unknown optimizer counts as sign-like.
SIGN_LIKE = ("sign-like", "unknown")


@dataclass(frozen=True)
class MuA(Law):
    """µA with a finite number of effective tokens, in the form of the optimizer's family.

    The best learning rate is the largest at which a layer's output still changes by Θ(1). Let
    τ = T·η over T steps, s be the scaling, r the rank, n the fan-in and b = `tokens`. B = 0 means
    that B starts at zero and A is drawn, as in PEFT. A = 0 is the reverse. For sign-like optimizers
    (Adam and its variants) the learning rate solves::

        B = 0     s·κ(r)·τ·(1 + κ(n)·τ) = 1
        A = 0     hypot(s·κ(n)·τ, s·κ(n)·κ(r)·τ²) = 1
        full      κ(n)·τ = 1
        κ(m) = √(m + (2/π)·m²/b);  κ(m) = m for tokens=None, the paper's law

    κ(m) is the size of a sum of m sign terms that serves b independent tokens at once. Only ratios
    of τ are used, so neither T nor the right-hand side matters.

    The equations for Muon, SGD and LAMB are in laws/_mua.py: `spectral_rate`, `gradient_rate` and
    `relative_rate`. They assume a square layer, since a reference states one width, and
    tokens=None means one token. Muon's and SGD's are evaluated at rank 16 for every pair: alpha,
    init, width and method change the learning rate, but the rank does not. No form is known to be
    right for Adafactor and LARS. Bound to one of these, the law becomes `Constant`.

    Source: Chen, Villar, Hayou, "Learning Rate Scaling across LoRA Ranks and Transfer to Full
    Finetuning" (ICML 2026, arXiv 2602.06204). The finite-token κ and the other families are
    extensions by this project.

    Args:
        tokens: b, the effective number of independent tokens, far below the number of tokens in a
            batch. None gives the paper's law. The default, "family", stands for 2 with sign-like
            optimizers and for 8 with Muon, SGD and LAMB. A number applies to every optimizer.
        family: the optimizer's family, set by `bind`. An unknown optimizer counts as sign-like.
        shape_factor: Muon's `adjust_lr_fn`, or the equivalent setting of another package, set by
            `bind`.

    >>> paper, ours = MuA(tokens=None), MuA()
    >>> at = Reference(rank=16, alpha=16, fan_in=4096)
    >>> more, kept = (Factor("w", "A", 64, 4096, 4096, scaling=s) for s in (1.0, 0.25))
    >>> round(paper.multiplier(more, at), 2)  # about r^(-1/2)
    0.48
    >>> round(ours.multiplier(kept, at), 2)  # alpha fixed: hardly any change
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
        """b as a number: the family's own, unless `tokens` states one. None for the paper's law."""
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
                f"The reference ({reference}) has no fan-in, and the scaling law needs it.",
                "Call reference.resolve(survey), or set its fan_in=.",
            )
        return self.sigma(factor) / self.sigma(reference.as_factor())

    def batch_multiplier(self, ratio: float) -> float:
        return float(ratio ** FORMS[self.family].batch)

    def sigma(self, at: Factor) -> float:
        """Return the learning rate that solves the family's equation at T = 1. Use ratios of it:
        the absolute number is only a first guess.
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
#
# Adam divides a gradient by its own size, so that every entry of an update is about ±η. In one step
# the output of an adapted layer changes by
#
#     s·(ΔB·A·x + B·ΔA·x + ΔB·ΔA·x)
#
# Each product is a sum of m terms of size η, where m is the number of columns of ΔB (the rank r) or
# of ΔA (the fan-in n). How large is the sum? For a single token the update points exactly along the
# gradient's signs, all terms have the same sign, and the sum is m·η. For many independent tokens
# the same update must serve them all, so for any one of them the signs are almost random and the
# sum is √m·η. `kappa` connects the two cases.


def kappa(m: float, b: float | None) -> float:
    """Return the size of a sum of m sign terms that serves b tokens: √(m + (2/π)·m²/b), and m for
    b = None.

    For m far below b it is √m (random signs), for m far above b it grows as m (aligned signs).

    >>> kappa(64, None), round(kappa(64, 8.0), 2)
    (64.0, 19.75)
    """
    return float(m) if b is None else math.sqrt(m + 2.0 / math.pi * m * m / b)


def sign_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str = ""
) -> float:
    """Return σ for sign-like updates (Adam), whose entries all have size η.

    ::

        B = 0     p·σ + q·σ² = 1          p = s·κ(r)
        A = 0     hypot(p·σ, q·σ²) = 1    p = s·κ(n)       q = s·κ(r)·κ(n)
        full      κ(n)·σ = 1
    """
    # B = 0: s·ΔB·A₀·x has size s·κ(r)·σ, because A₀·x has r entries of size 1. B·ΔA·x is zero at
    # the start. A = 0: s·B₀·ΔA·x has size s·κ(n)·σ, because ΔA·x has size κ(n)·σ and B₀ keeps
    # sizes. In both cases the product of the two updates, s·ΔB·ΔA·x, has size s·κ(r)·κ(n)·σ².
    k_r = kappa(r, b)
    k_n = kappa(n, b)
    if init == "full":
        return 1.0 / k_n
    p = s * k_r if init == "A" else s * k_n
    return root(init, p, s * k_r * k_n)


def root(init: str, p: float, q: float) -> float:
    """Return the positive root σ of p·σ + q·σ² = 1, or with A = 0 of hypot(p·σ, q·σ²) = 1.

    With B = 0 the two terms point in the same direction, so their sizes add. With A = 0 they are
    nearly orthogonal, so their squares add.
    """
    # Both are the quadratic formula, written so that nothing cancels if q is small. With A = 0 it
    # is solved for σ².
    if init == "B":
        return math.sqrt(2.0 / (p * p + math.sqrt(p**4 + 4.0 * q * q)))
    return 2.0 / (p + math.sqrt(p * p + 4.0 * q))


# --- spectral updates -----------------------------------------------------------------------------
#
# Muon replaces a gradient by its polar factor, all singular values of which are 1, and multiplies
# it by a shape factor that depends on the numbers of rows and columns.

# Muon's shape factor for an update of shape (rows, cols), by the names of adjust_lr_fn in torch and
# timm.
SHAPE_FACTORS: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "rms_to_rms": lambda rows, cols: math.sqrt(rows / cols),
    "rsqrt_in": lambda rows, cols: 1.0 / math.sqrt(cols),
}
# Settings of pytorch_optimizer and adv_optm that mean "match_rms_adamw".
_MATCHED = ("use_adjusted_lr", "rms_rescaling")


def spectral_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return σ for spectral updates (Muon). The change of the output is p·η + q·η².

    a_A and a_B are the shape factors of A and B, and m = √min(1, r/b + r/n)::

        B = 0     p = s·a_B·√(r/n)              q = s·a_A·a_B·m
        A = 0     p = s·a_A·√n·√(1/n + 1/r)·m   q as above
        full      p = a
    """
    # An update of B has rank min(r, b) and spans the features A·x, so it keeps their norm:
    # |ΔB·A₀·x| = a_B·√r for each token, which spread over n outputs has an rms of a_B·√(r/n).
    # An update of A has rank r, but the b tokens span up to n directions. It keeps the part m of
    # their norm √n. B₀, with entries of variance 1/r, turns a norm ν into an rms of ν·√(1/n + 1/r).
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
#
# An SGD update is the gradient itself. The gradient of B grows with A and the gradient of A with B,
# so the two feed each other and growth compounds. That is why hyperbolic functions appear.


def gradient_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return σ for gradient-like updates (SGD), with the gradient of the output held fixed.

    With φ = s·g₀·T·η, z = sinh²φ, k = min(b, n) and g₀² = n² + 2·b·n::

        B = 0     s²·z·(1 + z)·r·(r + k + 1)/n² = 1
        A = 0     s²·z·((1 + z)·(1 + (k + 1)/r) + max(n − k, 0)/r) = 1
        full      τ·√n·√(n + b) = 1
    """
    # With G = g·xᵀ, the gradient of the weight, the updates ΔA = −η·s·Bᵀ·G and ΔB = −η·s·G·Aᵀ are
    # linear in A and B. Take a singular pair (u, v) of G with value g₀. Over many small steps A·v
    # and Bᵀ·u mix as cosh φ and sinh φ. G has k such pairs, and g₀² is their power-weighted mean
    # for independent tokens. Full finetuning takes the change of a single step, as nothing
    # compounds.
    b = b or 1.0
    if init == "full":
        return 1.0 / math.sqrt(n * (n + b))
    k = min(b, n)
    if init == "A":
        both = single = s * math.sqrt(r * (r + k + 1.0)) / n
    else:
        both = s * math.sqrt(1.0 + (k + 1.0) / r)
        single = math.hypot(both, s * math.sqrt((n - k) / r))
    # Each condition is single²·z + both²·z² = 1, which is hypot(single·√z, both·z) = 1 in √z = sinh
    # φ.
    phi = math.asinh(root("B", single, both))
    return phi / (s * math.sqrt(n * n + 2.0 * b * n))


# --- relative-scale updates -----------------------------------------------------------------------
#
# LAMB scales Adam's update to the size of the weight itself, so a weight grows by compound
# interest.


def relative_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return σ for relative-scale updates (LAMB): sign-like directions, whose size is the learning
    rate times the matrix's own rms. LAMB's cap on the weights' norm is left out.

    ::

        B = 0     s·κ(r)·z(τ)·(1 + κ(n)·sinh(τ)/√n) = 1              z(τ) = τ/4·e^(τ − τ/4)
        A = 0     hypot(s·κ(n)·z(τ), s·κ(n)·κ(r)·z(τ)·sinh(τ)/√r) = 1
        full      κ(n)·sinh(τ)/√n = 1
    """
    # A matrix that was drawn with rms ρ moves by Δ, orthogonally to its start, so that its rms is
    # √(ρ² + Δ²). Then dΔ/dτ = √(ρ² + Δ²), and Δ = ρ·sinh τ. Here ρ is 1/√n for A and 1/√r for B.
    # A matrix that starts at zero has no size yet: its first step is a plain one of η = τ/4, after
    # which it grows to z(τ).
    k_n = kappa(n, b)
    k_r = kappa(r, b)
    if init == "full":
        return math.asinh(math.sqrt(n) / k_n)

    # The change grows with τ, so bisection over log τ finds where it is 1.
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
    """The form of µA for a family of optimizers.

    rate: the function that returns σ for an init, r, s, n, b and a shape.

    words: how a report describes an optimizer of the family. Of the evidence it states only
    measurements.

    one_rank: whether every pair is evaluated at rank 16. In small runs of SGD and Muon the best
    learning rate followed the form as alpha changed, but not as the rank changed
    (benchmarks/results/laws.md).

    batch: the exponent of the best learning rate in the batch size. It is 1/2 for updates that do
    not grow with the gradient (Malladi et al., arXiv 2205.10287), and 1 for those that do (Goyal et
    al., arXiv 1706.02677). For spectral and relative-scale updates 1/2 is an assumption.

    tokens: b of a law that uses its family's number. The number for sign-like optimizers was chosen
    after looking at all runs on file (benchmarks/answers.md). The other forms were judged with 8.
    """

    rate: Callable[..., float]
    words: str
    one_rank: bool = False
    batch: float = 0.5
    tokens: float = 8.0


_BY_ALPHA = (
    "{}: in small runs of {} the best learning rate followed µA's form for that family as alpha"
    " changed, but not as the rank changed, so the learning rates here do the same"
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
        "relative-scale: its learning rates follow µA's form for that family, which was derived for"
        " square layers; in small runs with alpha = rank the form was closer to the best learning"
        " rates than one learning rate for all ranks",
    ),
}
_NO_FORM = (
    "{}: no form of µA is known to be right for that family, so all ranks train at one learning"
    " rate"
)
# Families without a form, and how a report describes an optimizer of them.
ONE_RATE = {
    RANK_AWARE: f"{RANK_AWARE}: its own rule already adapts its updates to the rank, so all ranks"
    " train at one learning rate",
    "floored-scale": _NO_FORM.format("floored-scale"),
    "first-step": _NO_FORM.format("first-step"),
}


# --- corrections of a law -------------------------------------------------------------------------


class Correction(Law):
    """A law that corrects another one.

    Its multiplier is the inner law's, times a term for the LoRA matrix, divided by the same term
    for the reference. The rest is the inner law's.
    """

    law: Law

    def __post_init__(self) -> None:
        if not isinstance(self.law, Law):
            raise LawError(
                f"The law {self.name!r} corrects another law, but its law= is {shown(self.law)}.",
                "Pass an instance of a law, such as law=MuA().",
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
        """Return the correction of the learning rate at a configuration, up to a constant."""


def layers_of(law: Law) -> Iterator[Law]:
    """Yield a law, then the law that it corrects, and so on to the innermost one."""
    yield law
    while isinstance(law, Correction):
        law = law.law
        yield law


@dataclass(frozen=True)
class Power(Correction):
    """A law with a drift over the ranks and a factor for full finetuning, both of which a
    calibration fits::

        LoRA               multiplier = law · (r / r_ref)^exponent
        full finetuning    multiplier = law · (r_full / r_ref)^exponent · full_factor

    r_ref is the reference's rank. r_full is `pivot`, or the fan-in n if `to_full` is set. If the
    reference was tuned by full finetuning, (r_full)^exponent · full_factor takes the place of
    (r_ref)^exponent.

    Args:
        exponent: the drift, in octaves of learning rate per octave of rank. (An octave is a factor
            of 2.)
        full_factor: the factor for full finetuning, dimensionless.
        pivot: the rank at which the drift is evaluated for full finetuning.
        to_full: whether the drift continues to r = n in full finetuning.
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
    """A law whose learning rates fall faster as the rank grows, where A starts at zero. Around
    `MuA` it is the default law::

        A = 0                       multiplier ∝ law · ((r₀ + n) / (r₀ + min(r, n)))^p
        B = 0, full finetuning      multiplier ∝ law

    r₀ = `knee`, p = `power`, r is the rank and n the fan-in. The same term is taken at the
    reference. Above r₀ the learning rate falls as r^-p. At r = n it equals full finetuning's. The
    form is empirical: no theory gives it, and the paper's law does not contain it. For an
    embedding, whose width is 1, the learning rate does not fall.

    The fall applies to sign-like optimizers (Adam and its variants) and to unknown ones. Bound to
    an optimizer of another family, the result is the inner law, bound to that optimizer.

    Source: runs of this project (benchmarks/answers.md, init_b_forms.md).

    Args:
        knee: r₀, the rank below which the learning rate hardly falls.
        power: p, the fall in octaves of learning rate per octave of rank.
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
