"""Checks of arguments that more than one stage takes, each an error of cause and cure."""

from __future__ import annotations

import math
from typing import Any

from ._rate import Rate
from .errors import OptimizerError

__all__ = ["check_lr", "plain_lr"]


def plain_lr(lr: Any) -> Any:
    """What an optimizer keeps of the rate it is given: the float of a `Rate`, anything else as it is."""
    return float(lr) if isinstance(lr, Rate) else lr


def check_lr(lr: object, what: str = "lr") -> float:
    """`lr` as a positive finite float, from a number, a `Rate` or a one-element tensor; else an `OptimizerError`."""
    lr = plain_lr(lr)
    value = lr.item() if getattr(lr, "numel", lambda: 0)() == 1 else lr  # type: ignore[attr-defined]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptimizerError(f"{what} is {lr!r}.", "Give a positive finite number.")
    return float(value)
