"""This module checks arguments that several functions of this package accept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from msgspec import Meta

from ._rate import Rate
from .errors import InspectionError, OptimizerError, RankAwareError

# The lowest and highest value of each quantity, by its name in recipes, references, laws and
# sweeps. If the bounds are ints, the value is a whole number.
RANGES: Mapping[str, tuple[float, float]] = {
    "lr": (1e-30, 1e6),
    "trial_lr": (1e-100, 1e100),  # a learning rate converted to a reference, or from it
    "octaves": (0.0, 10.0),  # a margin, or a standard deviation
    "steepness": (0.0, 10.0),  # per octave
    "rank": (1, 2**31 - 1),
    "alpha": (1e-12, 1e12),
    "fan_in": (1e-9, 1e61),  # 2^200 stands for the limit of infinite width
    "batch": (1e-9, 1e15),
    "steps": (1, 10**15),
    "share": (0.0, 1.0),
    "seed": (-(2**63), 2**63 - 1),
    "loss": (-1e30, 1e30),
    # parameters of scaling laws
    "exponent": (-10.0, 10.0),
    "full_factor": (1e-9, 1e9),
    "pivot": (1e-9, 1e15),
    "knee": (0.0, 1e12),
    "power": (0.0, 1.0),
    "tokens": (1e-9, 1e12),
    "ratio": (1e-9, 1e9),
}
# In a recipe or a fit. Each rank has a panel in the figure, and the time of a fit grows with the
# cube of the number of trials.
MOST_RANKS = 64
MOST_TRIALS = 2000


def limits(name: str) -> Meta:
    """Return the allowed range of a quantity as metadata for msgspec."""
    low, high = RANGES[name]
    return Meta(ge=low, le=high)


def check_range(
    name: str, value: Any, argument: str, error: type[RankAwareError]
) -> None:
    """Raise an error if a value is not a number, or if it is outside the allowed range.

    Args:
        name: the quantity, a key of `RANGES`.
        value: the value.
        argument: the name of the value in the message, such as "A reference's rank".
        error: the class of the error.
    """
    lowest, highest = RANGES[name]
    given = shown(value)
    fits = is_number(value) and lowest <= value <= highest
    if isinstance(lowest, int):
        if not fits or value != int(value):
            raise error(
                f"{argument} is {given}, but it must be a whole number from {lowest:g} to"
                f" {highest:g}.",
                "Pass a whole number in this range.",
            )
    elif not fits:
        raise error(
            f"{argument} is {given}, but it must be a number from {lowest:g} to {highest:g}.",
            "Pass a number in this range.",
        )


def shown(value: object) -> str:
    """Return the repr of a value, shortened to 200 characters for an error message."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, or a very deeply nested list
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Convert NumPy and torch numbers and arrays to plain Python numbers, even if they
    are inside a list or a tuple. Anything else is returned unchanged.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def is_positive(value: object) -> TypeGuard[float]:
    """Return whether `value` is a positive finite number."""
    return is_number(value) and 0 < value <= sys.float_info.max


# Inits with which neither A nor B starts at zero, but for which `suggest_lr` knows a learning rate.
PUBLISHED_INITS = ("pissa", "olora", "lora_ga")


def check_choice(
    value: object,
    choices: Iterable[object],
    argument: str,
    error: type[RankAwareError] = InspectionError,
    cure: str = "Pass one of them.",
) -> None:
    """Raise an error if a value is not one of the allowed choices. The choices are
    strings, bools or None.

    Args:
        value: the value.
        choices: the values that are allowed.
        argument: the name of the value in the message, such as "The method".
        error: the class of the error.
        cure: the end of the message, which says what to do.
    """
    choices = list(choices)
    is_plain = isinstance(value, (str, bool, type(None)))
    if not is_plain or value not in choices:
        *most, last = map(repr, choices)
        allowed, given = f"{', '.join(most)} or {last}", shown(value)
        raise error(f"{argument} must be {allowed}, but {given} was passed.", cure)


def check_init(
    init: object,
    argument: str = "The init",
    error: type[RankAwareError] = InspectionError,
    *,
    known: Sequence[object] = ("A", "B"),
) -> None:
    """Raise an error if an init is not one of the known inits.

    The arguments `argument` and `error` have the same meaning as in `check_choice`.
    """
    cure = "Pass 'A' if B starts at zero, as in PEFT, or 'B' if A starts at zero."
    if init in PUBLISHED_INITS:
        cure = (
            f"No scaling law covers {init}. To get a first learning rate, call"
            f" suggest_lr(..., init={init!r}), or run rankaware suggest --init {init} in a shell."
        )
    check_choice(init, known, argument, error, cure)


def plain_lr(lr: Any) -> Any:
    """Convert a `Rate` or a NumPy number to a plain float. Return any other value, such
    as a tensor, unchanged.
    """
    if isinstance(lr, Rate):
        return float(lr)
    return lr if hasattr(lr, "numel") else plain(lr)


def check_lr(lr: object, argument: str = "lr") -> float:
    """Check a learning rate and return it as a float. The learning rate may also be a
    tensor with one element.

    argument: the name of the learning rate in the message.

    Raises:
        OptimizerError: it is not a positive finite number.
    """
    lr = plain_lr(lr)
    value: Any = lr
    if hasattr(value, "numel") and value.numel() == 1:
        value = value.item()
    if not is_positive(value):
        raise OptimizerError(
            f"{argument} is {lr!r}, but it must be a positive finite number.",
            "Pass a learning rate such as 2e-4.",
        )
    return float(value)
