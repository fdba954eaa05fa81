"""Checks of arguments that more than one stage takes, each an error of cause and cure."""

from __future__ import annotations

import math

from .errors import OptimizerError

__all__ = ["check_lr"]


def check_lr(lr: object, what: str = "lr") -> float:
    """`lr` as a positive finite float, from a number or a one-element tensor; an `OptimizerError` otherwise."""
    value = lr.item() if getattr(lr, "numel", lambda: 0)() == 1 else lr  # type: ignore[attr-defined]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptimizerError(f"{what} is {lr!r}.", "Give a positive finite number.")
    return float(value)
