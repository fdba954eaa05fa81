"""This module implements the scaling law µA and two laws that correct its predictions.

µA (Chen, Villar, Hayou) is based on stable feature updates: the best learning rate is
the largest learning rate at which the output of a layer still changes by Θ(1), no matter
how large the rank and the width are. How much a step changes the output of a layer depends
on the optimizer family: every entry of an Adam update has about the size of the learning
rate, a Muon update is orthogonal, and an SGD update is the gradient itself.

This module has one function per optimizer family: `sign_rate` for Adam, `spectral_rate`
for Muon, `gradient_rate` for SGD and `relative_rate` for LAMB. Each function returns σ,
the learning rate at which the output of the layer changes by 1. The equations for σ
leave out constant factors, so only the ratio of two values of σ is meaningful. The
multiplier of a learning rate is the ratio of two values of σ.

The equations use these symbols: W + s·B·A is the adapted weight, s is the scaling, r is
the rank, n is the fan-in of the layer, b is the effective number of independent tokens,
T is the number of steps, η is the learning rate, and τ = T·η. The init is "A" if A is
random and B starts at zero (written B = 0). The init is "B" if B is random and A starts at
zero (written A = 0), and "full" for a whole weight. `shape` is the name of Muon's shape factor.
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

# For Muon and SGD the rank has no effect if the scaling is fixed, so their equations are
# always evaluated at this rank. It is the middle of the ranks that were tried
# (benchmarks/results/laws.md).
_ONE_RANK = 16
# The families that use Adam's equations. An unknown optimizer is treated as sign-like.
SIGN_LIKE = ("sign-like", "unknown")


@dataclass(frozen=True)
class MuA(Law):
    """The scaling law µA, extended by a finite number of effective tokens.

    µA states that the best learning rate is the largest learning rate at which the output
    of a layer still changes by Θ(1). T is the number of steps, η the learning rate,
    τ = T·η, s the scaling, r the rank, n the fan-in and b = `tokens`. B = 0 means that B
    starts at zero and A is random, as in PEFT. A = 0 means that A starts at zero and B is
    random. For sign-like optimizers (Adam and its variants), the learning rate is the
    solution of these equations::

        B = 0     s·κ(r)·τ·(1 + κ(n)·τ) = 1
        A = 0     hypot(s·κ(n)·τ, s·κ(n)·κ(r)·τ²) = 1
        full      κ(n)·τ = 1
        κ(m) = √(m + (2/π)·m²/b);  κ(m) = m for tokens=None, the paper's law

    κ(m) is the size of a sum of m terms of size 1 whose signs are chosen to fit b
    independent tokens at the same time. The law only uses ratios of τ, so neither T nor the
    right-hand side of the equations affects the multiplier.

    The functions `spectral_rate`, `gradient_rate` and `relative_rate` in laws/_mua.py
    implement the equations for Muon, SGD and LAMB. These three functions assume that
    the layer is square, because a reference contains a single width. These three
    functions treat tokens=None as one token. The equations for Muon and SGD always use
    rank 16. For Muon and SGD, the learning rate depends on the scaling, the init, the
    width and the method. If the scaling stays the same, the rank does not change the
    learning rate of Muon and SGD. No correct equations are known for Adafactor and
    LARS, so `bind` returns the law `Constant` for these two optimizers.

    The law was published by Chen, Villar and Hayou in "Learning Rate Scaling across LoRA
    Ranks and Transfer to Full Finetuning" (ICML 2026, arXiv 2602.06204). This project added
    the finite number of tokens and the equations for optimizers other than Adam.

    Args:
        tokens: b, the effective number of independent tokens. It is much smaller than the
            number of tokens in a batch. With None, the law is the one in the paper. The
            default, "family", means 2 for sign-like optimizers and 8 for Muon, SGD and LAMB.
            A number applies to every optimizer.
        family: the optimizer family, set by `bind`. An unknown optimizer is treated as
            sign-like.
        shape_factor: the value of Muon's `adjust_lr_fn` argument, or of the equivalent
            setting in another package. It is set by `bind`.

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
        check_choice(self.family, FORMS, "In the law 'mua', family", LawError)
        shapes = SHAPE_FACTORS
        argument = "In the law 'mua', shape_factor"
        check_choice(self.shape_factor, shapes, argument, LawError)
        if self.tokens not in (None, "family"):
            check_ranges(self, "tokens")

    @property
    def effective_tokens(self) -> float | None:
        """The effective number of tokens as a number, or None for the law in the paper."""
        if self.tokens == "family":
            return FORMS[self.family].tokens
        return self.tokens

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        family = optimizer_family(optimizer_class, settings)
        # Without equations for the family, one learning rate for all ranks is the safest
        # choice.
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
                f"The scaling law needs a reference with a fan-in, but the reference ({reference})"
                " has no fan-in.",
                "Set fan_in, as in Reference(rank=16, alpha=32, fan_in=4096), or call"
                " reference.resolve(survey) to use the fan-in of a model.",
            )
        return self.sigma(factor) / self.sigma(reference.as_factor())

    def batch_multiplier(self, ratio: float) -> float:
        return float(ratio ** FORMS[self.family].batch)

    def sigma(self, at: Factor) -> float:
        """Return the learning rate that solves the equation of the optimizer family for one
        step.

        The equations leave out constant factors, so only the ratio of two solutions is
        reliable.
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
    """Return the size of a sum of m terms of size 1 whose signs must fit b tokens.

    The size is √(m + (2/π)·m²/b). If m is much smaller than b, the size of the sum is
    about √m, because the signs of the terms are then nearly random. If m is much larger
    than b, the size of the sum is proportional to m, because the signs of the terms
    then agree. With b = None, all terms have the same sign and the size of their sum is
    m.

    >>> kappa(64, None), round(kappa(64, 8.0), 2)
    (64.0, 19.75)
    """
    return float(m) if b is None else math.sqrt(m + 2.0 / math.pi * m * m / b)


def sign_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str = ""
) -> float:
    """Return the solution σ for sign-like optimizers such as Adam.

    All entries of a sign-like update have the size of the learning rate, which leads to
    these equations::

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
    """Return the positive solution σ of the equation that applies to an init.

    If B starts at zero, the two terms point in the same direction, so their sizes add and
    the equation is p·σ + q·σ² = 1. If A starts at zero, the two terms are nearly
    orthogonal, so their squares add and the equation is hypot(p·σ, q·σ²) = 1.
    """
    # Both lines are the quadratic formula, written without a difference of two nearly equal
    # numbers, so that the result stays accurate if q is small. If A starts at zero, the
    # formula is solved for σ².
    if init == "B":
        return math.sqrt(2.0 / (p * p + math.sqrt(p**4 + 4.0 * q * q)))
    return 2.0 / (p + math.sqrt(p * p + 4.0 * q))


# --- spectral updates -----------------------------------------------------------------------------
#
# Muon replaces a gradient by its polar factor, a matrix whose singular values are all 1. It
# then multiplies this matrix by a shape factor, which depends on the number of rows and
# columns.

# Muon's shape factor for an update of shape (rows, cols). The keys are the values of the
# argument adjust_lr_fn in torch and timm.
SHAPE_FACTORS: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "rms_to_rms": lambda rows, cols: math.sqrt(rows / cols),
    "rsqrt_in": lambda rows, cols: 1.0 / math.sqrt(cols),
}
# Two settings of pytorch_optimizer and adv_optm that have the same effect as
# "match_rms_adamw".
_MATCHED = ("use_adjusted_lr", "rms_rescaling")


def spectral_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return the solution σ for spectral optimizers such as Muon.

    The output of a layer changes by p·η + q·η² in one step. a is the shape factor of the
    whole weight, a_A and a_B are the shape factors of A and B, and m = √min(1, r/b + r/n).
    The coefficients are::

        B = 0     p = s·a_B·√(r/n)              q = s·a_A·a_B·m
        A = 0     p = s·a_A·√n·√(1/n + 1/r)·m   q as above
        full      p = a
    """
    # An update of B has rank min(r, b) and spans the features A·x, so it preserves their
    # norm: |ΔB·A₀·x| = a_B·√r for each token. This norm is spread over n outputs, so the
    # root mean square (rms) of the outputs is a_B·√(r/n). An update of A has rank r, but the
    # b tokens span up to n directions, so only the fraction m of their norm √n passes
    # through it. The entries of B₀ have variance 1/r, so B₀ turns a vector of norm ν into
    # one with an rms of ν·√(1/n + 1/r).
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
    """Return the solution σ for gradient-like optimizers such as SGD.

    The gradient with respect to the output is assumed to stay constant. With
    φ = s·g₀·T·η, z = sinh²φ, k = min(b, n) and g₀² = n² + 2·b·n, the equations are::

        B = 0     s²·z·(1 + z)·r·(r + k + 1)/n² = 1
        A = 0     s²·z·((1 + z)·(1 + (k + 1)/r) + max(n − k, 0)/r) = 1
        full      τ·√n·√(n + b) = 1
    """
    # With G = g·xᵀ, the gradient of the weight, the updates ΔA = −η·s·Bᵀ·G and ΔB = −η·s·G·Aᵀ are
    # linear in A and B. Take a singular pair (u, v) of G with value g₀. Over many small steps A·v
    # and Bᵀ·u mix as cosh φ and sinh φ. G has k such pairs, and g₀² is their power-weighted
    # mean for independent tokens. In full finetuning nothing compounds, so the change in a
    # single step is enough.
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
# LAMB scales Adam's update to the size of the weight itself, so a weight grows
# exponentially, like money with compound interest.


def relative_rate(
    init: str, r: float, s: float, n: float, b: float | None, shape: str
) -> float:
    """Return the solution σ for relative-scale optimizers such as LAMB.

    A relative-scale update points in the same direction as a sign-like update. The size of
    the update is the learning rate times the rms of the matrix. The equations ignore the
    upper limit that LAMB sets on the norm of a weight::

        B = 0     s·κ(r)·z(τ)·(1 + κ(n)·sinh(τ)/√n) = 1              z(τ) = τ/4·e^(τ − τ/4)
        A = 0     hypot(s·κ(n)·z(τ), s·κ(n)·κ(r)·z(τ)·sinh(τ)/√r) = 1
        full      κ(n)·sinh(τ)/√n = 1
    """
    # A random matrix of rms ρ changes by Δ, orthogonally to its initial value, so its rms
    # becomes √(ρ² + Δ²). Then dΔ/dτ = √(ρ² + Δ²), and therefore Δ = ρ·sinh τ. Here ρ is 1/√n
    # for A and 1/√r for B. A matrix that starts at zero has no size that could scale its
    # first update. Its first step is therefore a plain step of η = τ/4, after which the
    # matrix grows to z(τ).
    k_n = kappa(n, b)
    k_r = kappa(r, b)
    if init == "full":
        return math.asinh(math.sqrt(n) / k_n)

    # The change of the output increases with τ, so bisection over log τ finds the τ at which
    # it is 1. 64 halvings are enough for full double precision.
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
    """The version of µA for one optimizer family.

    rate: the function that returns the solution σ for an init, r, s, n, b and a shape.

    words: the description of the optimizer family in reports, which only mentions evidence
    that was measured.

    one_rank: whether the equations always use rank 16. In small runs with SGD and Muon, µA
    correctly predicted how the best learning rate changes with alpha, but not how it changes
    with the rank (benchmarks/results/laws.md).

    batch: the exponent in the power law between the batch size and the best learning
    rate. The exponent of the batch size is 1/2 for optimizers whose updates do not grow
    with the gradient (Malladi et al., arXiv 2205.10287). For optimizers whose updates
    grow with the gradient, the exponent of the batch size is 1 (Goyal et al., arXiv
    1706.02677). For spectral and relative-scale optimizers such as Muon and LAMB, the
    batch exponent of 1/2 is an assumption.

    tokens: the effective number of tokens b that is used with tokens="family". For sign-like
    optimizers, b was chosen after all recorded runs had been examined (benchmarks/answers.md).
    The other optimizer families were only evaluated with 8 effective tokens.
    """

    rate: Callable[..., float]
    words: str
    one_rank: bool = False
    batch: float = 0.5
    tokens: float = 8.0


_BY_ALPHA = (
    "{}. The learning rates change with alpha as µA predicts for this family, but not with the"
    " rank, because the best learning rates in small runs with {} did the same"
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
        "relative-scale. The learning rates follow µA's equations for this family, which assume"
        " square layers. In small runs with alpha = rank, the equations were closer to the best"
        " learning rates than one learning rate for all ranks",
    ),
}
_NO_FORM = (
    "{}. No correct equations of µA are known for this family, so all ranks train at one learning"
    " rate"
)
# Families without a form, and how a report describes an optimizer of them.
ONE_RATE = {
    RANK_AWARE: f"{RANK_AWARE}. It already adapts its updates to the rank, so all ranks train at"
    " one learning rate",
    "floored-scale": _NO_FORM.format("floored-scale"),
    "first-step": _NO_FORM.format("first-step"),
}


# --- corrections of a law -------------------------------------------------------------------------


class Correction(Law):
    """The base class of laws that correct the multiplier of another law.

    The multiplier of the other law, which is called the inner law, is multiplied by a correction.
    The method `term` returns a value for the trained matrix, which is divided by the value for the
    reference configuration. All other effects, for example the effect of the batch size, come from
    the inner law alone.
    """

    law: Law

    def __post_init__(self) -> None:
        if not isinstance(self.law, Law):
            name, value = self.name, shown(self.law)
            raise LawError(
                f"The law {name!r} corrects another law, so its argument law= must be an instance"
                f" of Law, but it is {value}.",
                "Pass a law, such as law=MuA().",
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
        """Return the factor that corrects the inner law's learning rate for a configuration.

        A multiplier only depends on the ratio of two corrections, so multiplying all
        corrections by a constant has no effect.
        """


def layers_of(law: Law) -> Iterator[Law]:
    """Yield a law, then the law that it corrects, and so on down to the innermost law."""
    yield law
    while isinstance(law, Correction):
        law = law.law
        yield law


@dataclass(frozen=True)
class Power(Correction):
    """A law that a calibration fits to its trials.

    The law corrects another law by a power of the rank and by a factor for full
    finetuning::

        LoRA               multiplier = law · (r / r_ref)^exponent
        full finetuning    multiplier = law · (r_full / r_ref)^exponent · full_factor

    r_ref is the rank of the reference. r_full is `pivot`, or the fan-in n if `to_full` is
    True. If the reference was tuned by full finetuning, the law divides by
    r_full^exponent · full_factor instead of r_ref^exponent.

    Args:
        exponent: the exponent of the rank, in octaves of learning rate per octave of rank.
            An octave is a factor of 2.
        full_factor: the factor for full finetuning, dimensionless.
        pivot: the rank that full finetuning counts as if `to_full` is False.
        to_full: whether full finetuning counts as a rank equal to the fan-in.
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
        argument = "In the law 'power', to_full"
        check_choice(self.to_full, (True, False), argument, LawError)

    def term(self, at: Factor) -> float:
        if at.role != "full":
            return math.pow(at.rank or 1, self.exponent)
        rank = at.fan_in if self.to_full else self.pivot
        return self.full_factor * math.pow(rank, self.exponent)


@dataclass(frozen=True)
class Falling(Correction):
    """The default law, which corrects `MuA` for LoRA matrices where A starts at zero.

    In this case, the best learning rate falls faster with the rank than `MuA` predicts::

        A = 0                       multiplier ∝ law · ((r₀ + n) / (r₀ + min(r, n)))^p
        B = 0, full finetuning      multiplier ∝ law

    r₀ = `knee`, p = `power`, r is the rank and n the fan-in. The law divides the correction for a
    matrix by the correction for the reference configuration. For ranks r above r₀, the correction
    is proportional to r^-p. If the rank r equals the fan-in n, the correction is 1, as in full
    finetuning. The formula is empirical: it has no theoretical derivation and is not in the paper.
    The law does not correct embeddings, because their fan-in is 1.

    The correction applies to sign-like optimizers (Adam and its variants) and to unknown
    optimizers. For all other optimizers, `bind` returns the inner law without the correction.

    The formula was fitted to this project's training runs (benchmarks/answers.md,
    init_b_forms.md).

    Args:
        knee: r₀, the rank below which the learning rate hardly falls.
        power: p, how steeply the learning rate falls, in octaves of learning rate per octave
            of rank.
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
