"""Families of optimizers: which family a class belongs to, and how far its updates move a layer's
output. No torch.

Each family has a function `rate(of, at)`. It returns the σ at which η_A = σ and η_B = λ·σ move the
output by 1 in T = 1. The equations are in the functions' docstrings. There s is the effective
multiplier, r the rank, n the fan-in, b the number of tokens and λ = η_B / η_A. τ = T·η.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from .._optimizers import optimizer_family
from ..errors import LawError


class Site(NamedTuple):
    """The configuration of a rate: init "A", "B" or "full", rank r, effective multiplier s, fan-in
    n.
    """

    init: str
    rank: float
    scaling: float
    fan_in: float


class Updates(NamedTuple):
    """Arguments of `MuA` that describe the updates. Only the spectral family has a shape factor."""

    tokens: float | None
    ratio: float = 1.0
    shape_factor: str = "original"


def kappa(m: float, tokens: float | None) -> float:
    """Return the size of a sum of m sign terms that serves b = `tokens` tokens: √(m + (2/π)·m²/b),
    or m for None.

    >>> kappa(64, None)
    64.0
    >>> round(kappa(64, 8.0), 2)
    19.75
    """
    return float(m) if tokens is None else math.sqrt(m + (2.0 / math.pi) * m * m / tokens)


def sign_terms(of: Updates, at: Site) -> tuple[float, float]:
    """Return (p, q) of the change p·η + q·η_A·η_B for sign-like updates, whose entries all have
    size η.

    The η of p is that of the factor that starts at zero. Under Init[A] the term s·ΔB·A₀·x has size
    s·κ(r)·η_B. Under Init[B] the term s·B₀·ΔA·x has size s·κ(n)·η_A. Under both, s·ΔB·ΔA·x has size
    s·κ(r)·κ(n)·η_A·η_B.
    """
    k_n = kappa(at.fan_in, of.tokens)
    if at.init == "full":
        return k_n, 0.0
    k_r = kappa(at.rank, of.tokens)
    return at.scaling * (k_r if at.init == "A" else k_n), at.scaling * k_r * k_n


def spectral_terms(of: Updates, at: Site) -> tuple[float, float]:
    """Return (p, q) for spectral updates (Muon): a polar factor, all singular values 1, times a
    shape factor a.

    An update P of B has rank min(r, b) and spans the features A·x. It keeps their norm: |P·A₀·x| =
    √r per token, an rms of √(r/n) over n outputs. An update of A spans r of the at most n
    directions of the b tokens. It keeps a norm of m·√n out of √n, with m = √min(1, r/b + r/n). B₀,
    with entries of variance 1/r, turns a norm ν into the rms ν·√(1/n + 1/r). Hence

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


def gradient_rate(of: Updates, at: Site) -> float:
    """Return σ for gradient-like updates (SGD), whose growth compounds. The output gradient g is
    held fixed.

    With G = g·xᵀ, ΔA = −η_A·s·Bᵀ·G and ΔB = −η_B·s·G·Aᵀ are linear in (A, B). Take a singular pair
    (u, v) of G with value g₀. Along it A·v and Bᵀ·u mix by cosh φ and sinh φ, with φ =
    s·g₀·T·√(η_A·η_B) for many small steps. G has k = min(b, n) pairs, with g₀² = n² + 2·b·n (the
    power-weighted mean for independent tokens). With z = sinh²φ,

        Init[A]   s²·λ·z·(1 + z)·r·(r + k + 1)/n² = 1
        Init[B]   s²/λ·z·((1 + z)·(1 + (k + 1)/r) + max(n − k, 0)/r) = 1
        full      τ·√n·√(n + b) = 1 (one step: nothing compounds)
    """
    n, r, s, ratio, tokens = at.fan_in, at.rank, at.scaling, of.ratio, of.tokens or 1.0
    if at.init == "full":
        return 1.0 / math.sqrt(n * (n + tokens))
    k = min(tokens, n)
    if at.init == "A":
        both = single = s * math.sqrt(ratio * r * (r + k + 1.0)) / n
    else:
        both = s * math.sqrt(1.0 / ratio * (1.0 + (k + 1.0) / r))
        single = math.hypot(both, s * math.sqrt(1.0 / ratio * (n - k) / r))
    phi = math.asinh(_in_quadrature(single, both))
    return phi / (s * math.sqrt(ratio * (n * n + 2.0 * tokens * n)))


def relative_rate(of: Updates, at: Site) -> float:
    """Return σ for relative-scale updates (LAMB): sign-like directions in units of the factor's own
    rms.

    A factor drawn with rms ρ moves by Δ, orthogonal to its start: dΔ/dτ = √(ρ² + Δ²), so Δ = ρ·sinh
    τ. A factor that starts at zero first takes one step of plain η = τ/4 and grows from there, to
    z(τ) = τ/4·e^(τ − τ/4). With ρ_A = 1/√n under Init[A] and ρ_B = 1/√r under Init[B],

        Init[A]   s·κ(r)·z(τ_B)·(1 + κ(n)·sinh(τ_A)/√n) = 1
        Init[B]   hypot(s·κ(n)·z(τ_A), s·κ(n)·κ(r)·z(τ_A)·sinh(τ_B)/√r) = 1
        full      κ(n)·sinh(τ)/√n = 1

    LAMB's cap on the weights' norm is left out.
    """
    n, r, s, ratio = at.fan_in, at.rank, at.scaling, of.ratio
    k_n = kappa(n, of.tokens)
    if at.init == "full":
        return math.asinh(math.sqrt(n) / k_n)
    k_r = kappa(r, of.tokens)

    def change(tau: float) -> float:
        if at.init == "A":
            return s * k_r * _grown(ratio * tau) * (1.0 + k_n * math.sinh(tau) / math.sqrt(n))
        return s * k_n * _grown(tau) * math.hypot(1.0, k_r * math.sinh(ratio * tau) / math.sqrt(r))

    return _rising_root(change, 50.0 / max(1.0, ratio))  # e^50 reaches any change


def _grown(tau: float) -> float:
    """Return z(τ), the size that a factor of zeros grows to."""
    first = tau / 4
    return first * math.exp(tau - first)


def _rising_root(change: Callable[[float], float], most: float) -> float:
    """Return the τ up to `most` at which a rising function of τ is 1, by bisection on log τ."""
    low, high = -700.0, math.log(most)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if change(math.exp(middle)) < 1.0 else (low, middle)
    return math.exp(high)


def _polynomial(
    terms: Callable[[Updates, Site], tuple[float, float]], of: Updates, at: Site
) -> float:
    """Return the root σ of p·σ + q·σ² = 1. Under Init[B] the terms are nearly orthogonal and add in
    quadrature.
    """
    p, q = terms(of, at)
    q *= of.ratio
    if at.init == "B":
        return _in_quadrature(p, q)
    if at.init == "A":
        p *= of.ratio
    return 2.0 / (p + math.sqrt(p * p + 4.0 * q))


def _in_quadrature(p: float, q: float) -> float:
    """Return the root x of hypot(p·x, q·x²) = 1."""
    return math.sqrt(2.0 / (p * p + math.sqrt(p**4 + 4.0 * q * q)))


class Form(NamedTuple):
    """A family's condition.

    rate: σ at a site.

    one_rank: whether every pair is evaluated at rank 16. Small runs of SGD and Muon followed the
    form with alpha but not with the rank (benchmarks/results/law_check.md).

    batch: the exponent of the best rate in the batch size. It is 1/2 for updates that do not grow
    with the gradient (Malladi et al., arXiv 2205.10287), and 1 for those that do (Goyal et al.,
    arXiv 1706.02677). For spectral and relative-scale updates 1/2 is an assumption without a
    source.
    """

    rate: Callable[[Updates, Site], float]
    one_rank: bool = False
    batch: float = 0.5


_SIGN_LIKE = Form(partial(_polynomial, sign_terms))
# Families that are not here (Adafactor's, LARS's) keep one rate.
FORMS = {
    "sign-like": _SIGN_LIKE,
    "spectral": Form(partial(_polynomial, spectral_terms), one_rank=True),
    "gradient-like": Form(gradient_rate, one_rank=True, batch=1.0),
    "relative-scale": Form(relative_rate),
    "unknown": _SIGN_LIKE,
}
# Muon's shape factor of a (rows, cols) update, by the names of torch.optim.Muon's adjust_lr_fn.
SHAPE_FACTORS: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}


def known_family(optimizer_class: type, settings: Mapping[str, Any] | None = None) -> str:
    """Return `optimizer_family`; raise a `LawError` if no law is derived for it. strict=True asks
    for this.
    """
    family = optimizer_family(optimizer_class, settings)
    if family in FORMS and family != "unknown":
        return family
    instead = (
        "scale it as a sign-like optimizer (like Adam)" if family == "unknown" else "keep one rate"
    )
    raise LawError(
        f"No law is derived for the family of {optimizer_class.__name__}.",
        f"Leave strict out to {instead}.",
    )
