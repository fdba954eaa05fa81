"""Families of optimizers: which one a class belongs to, and how far its updates move a layer's output. No torch.

Each family's `rate(of, site, a, b)` is the σ at which the shared time τ = T·η, as η_A = a·σ and η_B = b·σ, moves the
output by 1. The equations stand in the functions' docstrings: s is the effective multiplier, r the rank, n the fan-in,
b the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from .._optimizers import known_optimizer, optimizer_family
from ..errors import LawError


class Site(NamedTuple):
    """Where a rate is wanted: init "A", "B" or "full", rank r, effective multiplier s, fan-in n."""

    init: str
    rank: float
    scaling: float
    fan_in: float


class Updates(NamedTuple):
    """What a form knows of the updates: the effective tokens, and the arguments of `MuA` that only some forms use."""

    tokens: float | None
    shape_factor: str = "original"
    floor: float | None = None
    steps: int | None = None


Terms = Callable[[Updates, Site], tuple[float, float]]


def kappa(m: float, tokens: float | None) -> float:
    """Size of a sum of m sign terms serving b = `tokens` independent tokens: √(m + (2/π)·m²/b); m where b is None.

    >>> kappa(64, None)
    64.0
    >>> round(kappa(64, 8.0), 2)
    19.75
    """
    return float(m) if tokens is None else math.sqrt(m + (2.0 / math.pi) * m * m / tokens)


def sign_terms(of: Updates, at: Site) -> tuple[float, float]:
    """(p, q) of the change p·η + q·η_A·η_B for sign-like updates, whose entries all have size η.

    p's η is that of the factor that starts at zero: s·ΔB·A₀·x is s·κ(r)·η_B under Init[A], s·B₀·ΔA·x is s·κ(n)·η_A
    under Init[B]; the product s·ΔB·ΔA·x is s·κ(r)·κ(n)·η_A·η_B under both.
    """
    k_n = kappa(at.fan_in, of.tokens)
    if at.init == "full":
        return k_n, 0.0
    k_r = kappa(at.rank, of.tokens)
    return at.scaling * (k_r if at.init == "A" else k_n), at.scaling * k_r * k_n


def spectral_terms(of: Updates, at: Site) -> tuple[float, float]:
    """(p, q) for spectral updates: each a polar factor, all singular values 1, times its shape factor a (Muon).

    An update P of B, of rank min(r, b), spans the features A·x, so it keeps their norm: |P·A₀·x| = √r per token, an
    rms of √(r/n) over n outputs. An update of A keeps the part of x, of norm √n, that r of the b directions of the
    tokens hold, of at most n: m·√n with m = √min(1, r/b + r/n). B₀, with entries of variance 1/r, turns a norm ν into
    the rms ν·√(1/n + 1/r). Hence

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
    """σ for gradient-like updates, whose growth compounds: SGD with the output gradient g held fixed.

    With G = g·xᵀ, ΔA = −η_A·s·Bᵀ·G and ΔB = −η_B·s·G·Aᵀ are linear in (A, B): along a singular pair (u, v) of G, of
    value g₀, A·v and Bᵀ·u turn into each other by cosh φ and sinh φ, φ = s·g₀·T·√(η_A·η_B). G has k = min(b, n)
    pairs, of g₀² = n² + 2·b·n (the power-weighted mean for independent tokens). With λ = η_B/η_A and z = sinh²φ,

        Init[A]   s²·λ·z·(1 + z)·r·(r + k + 1)/n² = 1
        Init[B]   s²/λ·z·((1 + z)·(1 + (k + 1)/r) + max(n − k, 0)/r) = 1
        full      τ·√n·√(n + b) = 1, one step's: nothing compounds

    For a change of output far below 1 this is η ∝ 1/(s²·√(r·(r + k + 1))) at Init[A], the small-step limit; near 1
    and with r ≪ n the rate follows the logarithm of that, so no single power of the rank holds. T steps compound as
    (1 + φ/T)^T where many compound as e^φ: `compounded`.
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
    """σ for relative-scale updates: sign-like directions in units of the factor's own rms (LAMB, Adafactor).

    A factor drawn with rms ρ moves by Δ, across what was drawn: dΔ/dτ = √(ρ² + Δ²), so Δ = ρ·sinh τ. One at zero grows
    to z(τ): Adafactor's unit is at least `floor` = 1e-3, so z = floor·τ up to τ = 1 and floor·e^(τ − 1) from there;
    LAMB (floor=None) takes one step of plain η = τ/T first and grows from it, z = τ/T·e^(τ − τ/T), with T = `steps`,
    or 4. With ρ_A = 1/√n under Init[A] and ρ_B = 1/√r under Init[B],

        Init[A]   s·κ(r)·z(τ_B)·(1 + κ(n)·sinh(τ_A)/√n) = 1
        Init[B]   hypot(s·κ(n)·z(τ_A), s·κ(n)·κ(r)·z(τ_A)·sinh(τ_B)/√r) = 1
        full      κ(n)·sinh(τ)/√n = 1

    Not in it: LAMB's cap on the weights' norm, Adafactor's on the rate.
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
    """σ for LARS: the factor at zero takes one step of the plain gradient, and then next to none.

    LARS moves a weight w by η·c·|w| along its gradient, with a trust coefficient c of usually 1e-3; where w is zero it
    takes the gradient itself. So the first step decides: ΔB = −η_B·s·g·(A₀·x)ᵀ or ΔA = −η_A·s·B₀ᵀ·g·xᵀ, and with b
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
    """z(τ), the size that a factor of zeros grows to."""
    if of.floor is None:
        first = tau / (of.steps or 4)
        return first * math.exp(tau - first)
    return of.floor * (tau if tau < 1.0 else math.exp(tau - 1.0))


def compounded(phi: float, steps: int | None) -> float:
    """T·θ with (1 + θ)^T = e^φ: what T steps must add up to, to grow as far as many small ones of sum φ."""
    return phi if steps is None else steps * math.expm1(phi / steps)


def _rising_root(change: Callable[[float], float], most: float) -> float:
    """The τ up to `most` at which a rising function of τ is 1, by bisection of its logarithm to the last bit."""
    low, high = -700.0, math.log(most)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if change(math.exp(middle)) < 1.0 else (low, middle)
    return math.exp(high)


def _polynomial(terms: Terms, of: Updates, at: Site, a: float, b: float) -> float:
    """The root σ of p·σ + q·σ² = 1, in quadrature under Init[B]: there the two are nearly orthogonal."""
    p, q = terms(of, at)
    p, q = p * (b if at.init == "A" else a if at.init == "B" else 1.0), q * a * b
    return _in_quadrature(p, q) if at.init == "B" else 2.0 / (p + math.sqrt(p * p + 4.0 * q))


def _in_quadrature(p: float, q: float) -> float:
    """The root of hypot(p·x, q·x²) = 1."""
    return math.sqrt(2.0 / (p * p + math.sqrt(p**4 + 4.0 * q * q)))


def sign_units(of: Updates, at: Site) -> tuple[float, float]:
    """The two rates' units: a sum of n aligned terms for A, of r for B; s is the zero factor's to undo."""
    s_a, s_b = (1.0, at.scaling) if at.init == "A" else (at.scaling, 1.0)
    return 1.0 / (s_a * at.fan_in), 1.0 / (s_b * at.rank)


def spectral_units(of: Updates, at: Site) -> tuple[float, float]:
    """Norms instead of sums: ΔA·x of norm √r from x's √n, s·ΔB·A·x of norm √n from the features' √r."""
    factor = SHAPE_FACTORS[of.shape_factor]
    n, r = at.fan_in, at.rank
    s_a, s_b = (1.0, at.scaling) if at.init == "A" else (at.scaling, 1.0)
    return math.sqrt(r / n) / (s_a * factor(r, n)), math.sqrt(n / r) / (s_b * factor(n, r))


class Form(NamedTuple):
    """A family's condition: σ at a site, and the units of the two rates where they are derived.

    batch is the exponent of the best rate in the batch: 1/2 for updates that do not grow with the gradient, as their
    noise falls (Malladi et al., arXiv 2205.10287; 0.3 to 0.67 were measured here), 1 for those that do (Goyal et al.,
    arXiv 1706.02677). For spectral and relative-scale updates the half is taken over without a source.

    default is what the default law does with the form, by the rule of benchmarks/laws/law_check.py: "form" takes it,
    "one rank" takes it without the rank, "one rate" leaves it out.
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
# Muon's factor on a (rows, cols) update, by the names of torch.optim.Muon's adjust_lr_fn.
SHAPE_FACTORS: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "none": lambda rows, cols: 1.0,
}


def known_family(optimizer_class: type, settings: Mapping[str, Any] | None = None) -> str:
    """`optimizer_family`, or a `LawError` where it is unknown: what strict=True asks for."""
    family = optimizer_family(optimizer_class, settings)
    if family == "unknown":
        raise LawError(
            f"{optimizer_class.__name__} is of no family that a law is derived for.",
            "Leave strict out to scale it as a sign-like optimizer (Adam and kin), or use law='measured'.",
        )
    return family


def update_settings(optimizer_class: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `MuA` that an optimizer decides: family, Muon's shape factor, Adafactor's floor."""
    return {
        "family": optimizer_family(optimizer_class, settings),
        "shape_factor": settings.get("adjust_lr_fn") or "original",
        "floor": known_optimizer(optimizer_class)[1].floor,
    }
