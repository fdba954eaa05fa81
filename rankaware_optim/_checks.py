"""Checks of arguments that more than one stage takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, TypeGuard

from ._rate import Rate
from .errors import InspectionError, OptimizerError, RankAwareError


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is an int or a float; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_positive(value: object) -> TypeGuard[float]:
    """Whether `value` is a positive finite number."""
    return is_number(value) and 0 < value < math.inf


def is_whole(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether `value` is an int of at least `least`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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


def plain_lr(lr: Any) -> Any:
    """What an optimizer keeps of the rate it is given: the float of a `Rate`, anything else as it is."""
    return float(lr) if isinstance(lr, Rate) else lr


def check_lr(lr: object, what: str = "lr") -> float:
    """`lr` as a positive finite float, from a number, a `Rate` or a one-element tensor; else an `OptimizerError`."""
    lr = plain_lr(lr)
    value = lr.item() if getattr(lr, "numel", lambda: 0)() == 1 else lr  # type: ignore[attr-defined]
    if not is_positive(value) or value > sys.float_info.max:  # an int may be larger
        raise OptimizerError(f"{what} is {lr!r}.", "Give a positive finite number.")
    return float(value)
