"""Checks of arguments that more than one stage takes, each an error of cause and cure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import InspectionError, OptimizerError, RankAwareError

__all__ = ["check_init", "check_lr"]


def check_init(
    init: object,
    what: str = "The init is",
    error: type[RankAwareError] = InspectionError,
    *,
    known: Sequence[object] = ("A", "B"),
) -> None:
    """Refuse an init that is none of `known`, by an `error` whose sentence begins with `what`."""
    if not (init is None or isinstance(init, str)) or init not in known:
        others = "".join(f", {other!r}" for other in known[2:])
        raise error(f"{what} 'A' (B zero) or 'B' (A zero){others}, not {init!r}.", "Give one of them.")


def check_lr(lr: object, what: str = "lr") -> float:
    """`lr` as a positive finite float, from a number or a one-element tensor; an `OptimizerError` otherwise."""
    value = lr.item() if getattr(lr, "numel", lambda: 0)() == 1 else lr  # type: ignore[attr-defined]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptimizerError(f"{what} is {lr!r}.", "Give a positive finite number.")
    return float(value)
