"""Checks of arguments that more than one stage takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ._rate import Rate
from .errors import InspectionError, OptimizerError, RankAwareError

# What a number may be, lowest and highest, by its name in recipes, references, laws and sweeps. Ints are of whole ones.
RANGES: Mapping[str, tuple[float, float]] = {
    "lr": (1e-30, 1e6),
    "trial_lr": (1e-100, 1e100),  # moved to a reference, or from it
    "octaves": (0.0, 10.0),  # by which rates stay below the best one; a standard deviation
    "slope": (-10.0, 10.0),  # octaves per octave
    "steepness": (0.0, 10.0),  # per octave
    "rank": (1, 2**31 - 1),
    "alpha": (1e-12, 1e12),
    "fan_in": (1e-9, 1e61),  # 2^200 stands for the limit of a large one
    "batch": (1e-9, 1e15),
    "steps": (1, 10**15),
    "share": (0.0, 1.0),
    "seed": (-(2**63), 2**63 - 1),
    "loss": (-1e30, 1e30),
    # parameters of laws
    "exponent": (-10.0, 10.0),
    "full_factor": (1e-9, 1e9),
    "pivot": (1e-9, 1e15),
    "knee": (0.0, 1e12),
    "power": (0.0, 1.0),
    "tokens": (1e-9, 1e12),
    "ratio": (1e-9, 1e9),
    "floor": (1e-30, 1e6),
    "target": (1e-9, 1e9),
}
MOST_TRIALS = 2000  # of a recipe or a fit, whose time grows with their cube


def is_within(name: str, value: object) -> TypeGuard[float]:
    """Whether `value` is a number in the range of `name`."""
    low, high = RANGES[name]
    return is_number(value) and low <= value <= high and (isinstance(low, float) or value == int(value))


def range_of(name: str) -> str:
    """The range of `name` in words.

    >>> range_of("rank"), range_of("share")
    ('a whole number from 1 to 2147483647', 'a number from 0 to 1')
    """
    low, high = RANGES[name]
    return f"a number from {low:g} to {high:g}" if isinstance(low, float) else f"a whole number from {low} to {high}"


def shown(value: object) -> str:
    """A value as an error shows it: its repr, cut short."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, a list within itself thousands deep
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


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
