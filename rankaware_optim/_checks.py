"""Checks of arguments that more than one stage takes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from msgspec import Meta

from ._rate import Rate
from .errors import InspectionError, OptimizerError, RankAwareError

# Lowest and highest values by name in recipes, references, laws and sweeps. Int bounds mean that
# the value is whole.
RANGES: Mapping[str, tuple[float, float]] = {
    "lr": (1e-30, 1e6),
    "trial_lr": (1e-100, 1e100),  # a rate moved to a reference, or from it
    "octaves": (0.0, 10.0),  # a margin, or a standard deviation
    "steepness": (0.0, 10.0),  # per octave
    "rank": (1, 2**31 - 1),
    "alpha": (1e-12, 1e12),
    "fan_in": (1e-9, 1e61),  # 2^200 is used for the limit of a large width
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
}
MOST_RANKS = 64  # in a recipe or a fit, each with a panel in the figure
MOST_TRIALS = 2000  # in a recipe or a fit, whose time grows with their cube


def limits(name: str) -> Meta:
    """Return the range of `name` as msgspec checks it."""
    low, high = RANGES[name]
    return Meta(ge=low, le=high)


def check_range(name: str, value: Any, what: str, error: type[RankAwareError]) -> None:
    """Raise an `error` if `value` is not a number in the range of `name`. The message begins with
    `what`.
    """
    low, high = RANGES[name]
    fits = is_number(value) and low <= value <= high
    kind = "a number" if isinstance(low, float) else "a whole number"
    if not fits or (isinstance(low, int) and value != int(value)):
        raise error(
            f"{what} is {shown(value)}.", f"Give {kind} from {low:g} to {high:g}."
        )


def shown(value: object) -> str:
    """Return a value's repr for an error message, cut to 200 characters."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, or a very deeply nested list
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Return numbers and arrays of NumPy or torch as Python's, also in a list or a tuple. The rest
    is unchanged.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def is_positive(value: object) -> TypeGuard[float]:
    """Return whether `value` is a positive finite number."""
    return is_number(value) and 0 < value <= sys.float_info.max


# Inits at which neither factor starts at zero, and for which `suggest_lr` knows a rate.
PUBLISHED_INITS = ("pissa", "olora", "lora_ga")


def check_choice(
    value: object,
    choices: Iterable[object],
    what: str,
    error: type[RankAwareError] = InspectionError,
    cure: str = "Give one of them.",
) -> None:
    """Raise an `error` if a text, a bool or None is not one of `choices`. The message begins with
    `what`.
    """
    choices = list(choices)
    is_plain = isinstance(value, (str, bool, type(None)))
    if not is_plain or value not in choices:
        *most, last = map(repr, choices)
        raise error(f"{what} {', '.join(most)} or {last}, not {shown(value)}.", cure)


def check_init(
    init: object,
    what: str = "The init is",
    error: type[RankAwareError] = InspectionError,
    *,
    known: Sequence[object] = ("A", "B"),
) -> None:
    """Raise an `error` if `init` is not one of `known`. The message begins with `what`."""
    cure = "Give 'A' if B starts at zero, as in PEFT, or 'B' if A does."
    if init in PUBLISHED_INITS:
        cure = (
            f"At {init} take a first rate: suggest_lr(..., init={init!r}), in a shell rankaware"
            f" suggest --init {init}."
        )
    check_choice(init, known, what, error, cure)


def plain_lr(lr: Any) -> Any:
    """Return a rate as an optimizer stores it: the float of a `Rate` or of NumPy's number, anything
    else unchanged.
    """
    if isinstance(lr, Rate):
        return float(lr)
    return lr if hasattr(lr, "numel") else plain(lr)


def check_lr(lr: object, what: str = "lr") -> float:
    """Return a number, `Rate` or one-element tensor as a positive finite float, or raise an
    `OptimizerError`.
    """
    lr = plain_lr(lr)
    value: Any = lr
    if hasattr(value, "numel") and value.numel() == 1:
        value = value.item()
    if not is_positive(value):
        raise OptimizerError(f"{what} is {lr!r}.", "Give a positive finite number.")
    return float(value)
