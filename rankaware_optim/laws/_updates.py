"""Families of optimizers: which family a class belongs to, and how far its updates move a layer's output. No torch.

Each family has a function `rate(of, site, a, b)`. It returns the σ at which η_A = a·σ and η_B = b·σ move the output by
1 in T = 1. The equations are in the functions' docstrings. There s is the effective multiplier, r the rank, n the
fan-in and b the number of tokens. τ = T·η.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from .._optimizers import known_optimizer, optimizer_family
from ..errors import LawError


class Site(NamedTuple):
    """The configuration of a rate: init "A", "B" or "full", rank r, effective multiplier s, fan-in n."""

    init: str
    rank: float
    scaling: float
    fan_in: float


class Updates(NamedTuple):
    """Arguments of `MuA` that describe the updates. Only some families use more than `tokens`."""

    tokens: float | None
    shape_factor: str = "original"
    floor: float | None = None
    steps: int | None = None


Terms = Callable[[Updates, Site], tuple[float, float]]


def kappa(m: float, tokens: float | None) -> float:
    """Return the size of a sum of m sign terms that serves b = `tokens` tokens: √(m + (2/π)·m²/b), or m for None.

    >>> kappa(64, None)
    64.0
    >>> round(kappa(64, 8.0), 2)
    19.75
    """
    return float(m) if tokens is None else math.sqrt(m + (2.0 / math.pi) * m * m / tokens)


def sign_terms(of: Updates, at: Site) -> tuple[float, float]:
    """Return (p, q) of the change p·η + q·η_A·η_B for sign-like updates, whose entries all have size η.

    The η of p is that of the factor that starts at zero. Under Init[A] the term s·ΔB·A₀·x has size s·κ(r)·η_B. Under
    Init[B] the term s·B₀·ΔA·x has size s·κ(n)·η_A. Under both, s·ΔB·ΔA·x has size s·κ(r)·κ(n)·η_A·η_B.
    """
    k_n = kappa(at.fan_in, of.tokens)
    if at.init == "full":
        return k_n, 0.0
    k_r = kappa(at.rank, of.tokens)
    return at.scaling * (k_r if at.init == "A" else k_n), at.scaling * k_r * k_n


def spectral_terms(of: Updates, at: Site) -> tuple[float, float]:
    """Return (p, q) for spectral updates (Muon): a polar factor, all singular values 1, times a shape factor a.

    An update P of B has rank min(r, b) and spans the features A·x. It keeps their norm: |P·A₀·x| = √r per token, an rms
    of √(r/n) over n outputs. An update of A spans r of the at most n directions of the b tokens. It keeps a norm of
    m·√n out of √n, with m = √min(1, r/b + r/n). B₀, with entries of variance 1/r, turns a norm ν into the rms ν·√(1/n +
    1/r). Hence

        Init[A]   p = s·a_B·√(r/n)              q = s·a_A·a_B·m
        Init[B]   p = s·a_A·√n·√(1/n + 1/r)·m   q as above
        full      p = a
    """
    n, r, s = at.fan_in, at.rank, at.scaling
    factor = SHAPE_FACTORS[of.shape_factor]
    if at.init == "full":
        return factor(n, n), 0.0
    a_a, a_b = factor(r, n), factor(n, r)
    m = math.sqrt(min(1.0, r / (of.tokens or 1.0) + r / n))
    p = a_b * math.sqrt(r / n) if at.init == "A" else a_a * math.sqrt(1.0 + n / r) * m
    return s * p, s * a_a * a_b * m


def gradient_rate(of: Updates, at: Site, a: float, b: float) -> float:
    """Return σ for gradient-like updates (SGD), whose growth compounds. The output gradient g is held fixed.

    With G = g·xᵀ, ΔA = −η_A·s·Bᵀ·G and ΔB = −η_B·s·G·Aᵀ are linear in (A, B). Take a singular pair (u, v) of G with
    value g₀. Along it A·v and Bᵀ·u mix by cosh φ and sinh φ, with φ = s·g₀·T·√(η_A·η_B). G has k = min(b, n) pairs,
    with g₀² = n² + 2·b·n (the power-weighted mean for independent tokens). With λ = η_B/η_A and z = sinh²φ,

        Init[A]   s²·λ·z·(1 + z)·r·(r + k + 1)/n² = 1
        Init[B]   s²/λ·z·((1 + z)·(1 + (k + 1)/r) + max(n − k, 0)/r) = 1
        full      τ·√n·√(n + b) = 1 (one step: nothing compounds)

    Under Init[A] and for a change of output far below 1, this gives η ∝ 1/(s²·√(r·(r + k + 1))). Near 1 and with r ≪ n
    the rate follows the logarithm of that, so no single power of the rank holds. Many small steps compound as e^φ and T
    steps as (1 + φ/T)^T; see `compounded`.
    """
    n, r, s, tokens = at.fan_in, at.rank, at.scaling, of.tokens or 1.0
    if at.init == "full":
        return 1.0 / math.sqrt(n * (n + tokens))
    k = min(tokens, n)
    if at.init == "A":
        both = single = s * math.sqrt(b / a * r * (r + k + 1.0)) / n
    else:
        both = s * math.sqrt(a / b * (1.0 + (k + 1.0) / r))
        single = math.hypot(both, s * math.sqrt(a / b * (n - k) / r))
    sinh = _in_quadrature(single, both)
    return compounded(math.asinh(sinh), of.steps) / (s * math.sqrt(a * b * (n * n + 2.0 * tokens * n)))


def relative_rate(of: Updates, at: Site, a: float, b: float) -> float:
    """Return σ for relative-scale updates (LAMB, Adafactor): sign-like directions in units of the factor's own rms.

    A factor drawn with rms ρ moves by Δ, orthogonal to its start: dΔ/dτ = √(ρ² + Δ²), so Δ = ρ·sinh τ. A factor that
    starts at zero grows to z(τ). Adafactor's unit is at least `floor` = 1e-3, so z = floor·τ up to τ = 1 and then
    floor·e^(τ − 1). LAMB (floor=None) first takes one step of plain η = τ/T and grows from there: z = τ/T·e^(τ − τ/T),
    with T = `steps`, by default 4. With ρ_A = 1/√n under Init[A] and ρ_B = 1/√r under Init[B],

        Init[A]   s·κ(r)·z(τ_B)·(1 + κ(n)·sinh(τ_A)/√n) = 1
        Init[B]   hypot(s·κ(n)·z(τ_A), s·κ(n)·κ(r)·z(τ_A)·sinh(τ_B)/√r) = 1
        full      κ(n)·sinh(τ)/√n = 1

    LAMB's cap on the weights' norm and Adafactor's cap on the rate are left out.
    """
    n, r, s = at.fan_in, at.rank, at.scaling
    k_n = kappa(n, of.tokens)
    if at.init == "full":
        return compounded(math.asinh(math.sqrt(n) / k_n), of.steps)
    k_r = kappa(r, of.tokens)

    def change(tau: float) -> float:
        if at.init == "A":
            return s * k_r * _grown(of, b * tau) * (1.0 + k_n * math.sinh(a * tau) / math.sqrt(n))
        return s * k_n * _grown(of, a * tau) * math.hypot(1.0, k_r * math.sinh(b * tau) / math.sqrt(r))

    return compounded(_rising_root(change, 50.0 / max(a, b)), of.steps)  # e^50 reaches any change


def first_step_rate(of: Updates, at: Site, a: float, b: float) -> float:
    """Return σ for LARS: the factor at zero takes one step of the plain gradient, and then hardly moves.

    LARS moves a weight w by η·c·|w| along its gradient, with a trust coefficient c of usually 1e-3. If w is zero it
    uses the gradient itself. So the first step decides: ΔB = −η_B·s·g·(A₀·x)ᵀ or ΔA = −η_A·s·B₀ᵀ·g·xᵀ. With b
    independent tokens

        Init[A]   s²·τ_B·√(r·(r + b + 2 + b·r/n)) = 1
        Init[B]   s²·τ_A·√(n·(n + b)·(1 + n/r)) = 1
        full      c·τ·√((n + b)/b) = 1, from |W| = √n
    """
    n, r, s, tokens = at.fan_in, at.rank, at.scaling, of.tokens or 1.0
    if at.init == "full":
        return 1e3 * math.sqrt(tokens / (n + tokens))
    if at.init == "A":
        return 1.0 / (b * s * s * math.sqrt(r * (r + tokens + 2.0 + tokens * r / n)))
    return 1.0 / (a * s * s * math.sqrt(n * (n + tokens) * (1.0 + n / r)))


def _grown(of: Updates, tau: float) -> float:
    """Return z(τ), the size that a factor of zeros grows to."""
    if of.floor is None:
        first = tau / (of.steps or 4)
        return first * math.exp(tau - first)
    return of.floor * (tau if tau < 1.0 else math.exp(tau - 1.0))


def compounded(phi: float, steps: int | None) -> float:
    """Return T·θ with (1 + θ)^T = e^φ: the sum of T steps that grow as much as many small steps of sum φ."""
    return phi if steps is None else steps * math.expm1(phi / steps)


def _rising_root(change: Callable[[float], float], most: float) -> float:
    """Return the τ up to `most` at which a rising function of τ is 1, by bisection on log τ."""
    low, high = -700.0, math.log(most)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if change(math.exp(middle)) < 1.0 else (low, middle)
    return math.exp(high)


def _polynomial(terms: Terms, of: Updates, at: Site, a: float, b: float) -> float:
    """Return the root σ of p·σ + q·σ² = 1. Under Init[B] the terms are nearly orthogonal and add in quadrature."""
    p, q = terms(of, at)
    p, q = p * (b if at.init == "A" else a if at.init == "B" else 1.0), q * a * b
    return _in_quadrature(p, q) if at.init == "B" else 2.0 / (p + math.sqrt(p * p + 4.0 * q))


def _in_quadrature(p: float, q: float) -> float:
    """Return the root x of hypot(p·x, q·x²) = 1."""
    return math.sqrt(2.0 / (p * p + math.sqrt(p**4 + 4.0 * q * q)))


def sign_units(of: Updates, at: Site) -> tuple[float, float]:
    """Return the units of η_A and η_B: a sum of n aligned terms for A, of r for B. The zero factor's also undoes s."""
    s_a, s_b = (1.0, at.scaling) if at.init == "A" else (at.scaling, 1.0)
    return 1.0 / (s_a * at.fan_in), 1.0 / (s_b * at.rank)


def spectral_units(of: Updates, at: Site) -> tuple[float, float]:
    """Return the units of η_A and η_B by norms: ΔA·x has √r from √n of x, s·ΔB·A·x has √n from √r of the features."""
    factor = SHAPE_FACTORS[of.shape_factor]
    n, r = at.fan_in, at.rank
    s_a, s_b = (1.0, at.scaling) if at.init == "A" else (at.scaling, 1.0)
    return math.sqrt(r / n) / (s_a * factor(r, n)), math.sqrt(n / r) / (s_b * factor(n, r))


class Form(NamedTuple):
    """A family's condition.

    rate: σ at a site. units: the units of η_A and η_B, if they are derived for the family.

    batch: the exponent of the best rate in the batch size. It is 1/2 for updates that do not grow with the gradient
    (Malladi et al., arXiv 2205.10287), and 1 for those that do (Goyal et al., arXiv 1706.02677). For spectral and
    relative-scale updates 1/2 is an assumption without a source.

    default: how the default law uses the form, by the rule of benchmarks/laws/law_check.py. "form" uses it, "one rank"
    uses it without the rank, "one rate" does not use it.
    """

    rate: Callable[[Updates, Site, float, float], float]
    units: Terms | None = None
    batch: float = 0.5
    default: Literal["form", "one rank", "one rate"] = "form"


_SIGN_LIKE = Form(partial(_polynomial, sign_terms), sign_units)
FORMS = {
    "sign-like": _SIGN_LIKE,
    "spectral": Form(partial(_polynomial, spectral_terms), spectral_units, default="one rank"),
    "gradient-like": Form(gradient_rate, batch=1.0, default="one rank"),
    "relative-scale": Form(relative_rate),
    "first-step": Form(first_step_rate, default="one rate"),
    "unknown": _SIGN_LIKE,
}
# Muon's shape factor of a (rows, cols) update, by the names of torch.optim.Muon's adjust_lr_fn.
SHAPE_FACTORS: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "none": lambda rows, cols: 1.0,
}


def known_family(optimizer_class: type, settings: Mapping[str, Any] | None = None) -> str:
    """Return `optimizer_family`; raise a `LawError` if it is unknown. strict=True asks for this."""
    family = optimizer_family(optimizer_class, settings)
    if family == "unknown":
        raise LawError(
            f"No law is derived for the family of {optimizer_class.__name__}.",
            "Leave strict out to scale it as a sign-like optimizer (like Adam).",
        )
    return family


def update_settings(optimizer_class: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `MuA` that follow from an optimizer: family, Muon's shape factor, Adafactor's floor."""
    return {
        "family": optimizer_family(optimizer_class, settings),
        "shape_factor": settings.get("adjust_lr_fn") or "original",
        "floor": known_optimizer(optimizer_class)[1].floor,
    }
