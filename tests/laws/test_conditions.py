"""The conditions that define µA for each optimizer family, solved numerically: every multiplier is
the ratio of two roots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankaware_optim import MuA

from .sites import sites

# Each function below returns how far a layer's output moves if a LoRA pair, or a whole weight,
# trains at the learning rate τ. These are the left-hand sides of the conditions in the docstrings
# of laws/_mua.py, for T = 1, with κ(m) for b tokens.


def size(m: float, b: float | None) -> float:
    """Return κ(m) = √(m + (2/π)·m²/b), or m if b is None (no interference between tokens)."""
    return m if b is None else (m + 2 / math.pi * m**2 / b) ** 0.5


def sign_like(init, tau, s, r, n, b, shape):
    if init == "full":
        return size(n, b) * tau
    both = s * size(r, b) * size(n, b) * tau**2
    if init == "A":
        return s * size(r, b) * tau + both
    return math.hypot(s * size(n, b) * tau, both)


def spectral(init, tau, s, r, n, b, shape):
    scaled = {
        "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
        "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    }[shape]
    if init == "full":
        return scaled(n, n) * tau
    of_a, of_b = scaled(r, n) * tau, scaled(n, r) * tau
    m = min(1.0, r / (b or 1.0) + r / n) ** 0.5
    if init == "A":
        return s * of_b * (r / n) ** 0.5 + s * of_a * of_b * m
    drawn = n**0.5 * (1 / n + 1 / r) ** 0.5
    return math.hypot(s * of_a * drawn * m, s * of_a * of_b * m)


def gradient_like(init, tau, s, r, n, b, shape):
    b = b or 1.0
    if init == "full":
        return tau * n**0.5 * (n + b) ** 0.5
    k = min(b, n)
    z = math.sinh(s * (n**2 + 2 * b * n) ** 0.5 * tau) ** 2
    if init == "A":
        return (s**2 * z * (1 + z) * r * (r + k + 1) / n**2) ** 0.5
    return (s**2 * z * ((1 + z) * (1 + (k + 1) / r) + max(n - k, 0) / r)) ** 0.5


def relative_scale(init, tau, s, r, n, b, shape):
    from_zero = s * tau / 4 * math.exp(tau - tau / 4)
    whole = size(n, b) * math.sinh(tau) / n**0.5
    if init == "full":
        return whole
    if init == "A":
        return from_zero * size(r, b) * (1 + whole)
    one = from_zero * size(n, b)
    return math.hypot(one, one * size(r, b) * math.sinh(tau) / r**0.5)


CONDITIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    # family: the condition, and the rank at which it is evaluated if that is always the same
    "sign-like": (sign_like, None),
    "unknown": (sign_like, None),
    "spectral": (spectral, 16),
    "gradient-like": (gradient_like, 16),
    "relative-scale": (relative_scale, None),
}


def root(law: MuA, init: str, rank: int, scaling: float, fan_in: float) -> float:
    """Return the learning rate τ at which the condition of the law's family holds, found by
    bisection.
    """
    condition, one_rank = CONDITIONS[law.family]

    def moved(tau: float) -> float:
        others = scaling, one_rank or rank, fan_in, law.tokens, law.shape_factor
        try:
            return condition(init, tau, *others)
        except OverflowError:
            return math.inf

    low, high = -200.0, 60.0  # log2 τ
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(2.0**middle) < 1.0 else (low, middle)
    return 2.0**low


b_of_laws = st.none() | st.floats(0.25, 1e5)


@pytest.mark.parametrize("family", CONDITIONS)
@given(to=sites, origin=sites, b=b_of_laws, shape=st.booleans())
def test_multipliers_are_ratios_of_roots(family, to, origin, b, shape):
    """Between any two configurations of LoRA and full finetuning, the multiplier is the ratio of
    the two roots of the family's condition.
    """
    law = MuA(b, family, "match_rms_adamw" if shape else "original")
    base = root(law, *origin)
    tau = root(law, *to)
    assert law.sigma(to.factor()) == pytest.approx(tau, rel=1e-9)
    assert law.multiplier(to.factor(), origin.reference()) == pytest.approx(
        tau / base, rel=1e-9
    )
    if to.init != "full":
        of_b = law.multiplier(to.factor("B"), origin.reference())
        assert of_b == pytest.approx(tau / base, rel=1e-9)
