"""Checks of single arguments of `calibrate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .._checks import MOST_RANKS, check_lr, is_number, is_positive, is_whole
from ..errors import CalibrationError


def _is_distinct(values: object, fits: Callable[[Any], bool]) -> bool:
    """Return whether `values` is a non-empty sequence of distinct values that all fit."""
    return isinstance(values, Sequence) and 0 < len(values) == len(
        {*filter(fits, values)}
    )


def _are_ranks(value: Any) -> bool:
    return (
        _is_distinct(value, lambda r: r is None or is_whole(r))
        and len(value) <= MOST_RANKS
    )


def _are_seeds(value: Any) -> bool:
    return _is_distinct(value, lambda s: is_whole(s, -(2**63) + 1) and s < 2**63)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


# A check of each argument, and the cure in the error message.
_COUNT = "Give a whole number of at least 1."
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ranks": (
        _are_ranks,
        f"Give at most {MOST_RANKS} distinct positive whole numbers, such as (4, 64), and None for"
        " full.",
    ),
    "seeds": (_are_seeds, "Give distinct whole numbers, such as (0, 1)."),
    "steps": (is_whole, _COUNT),
    "target_steps": (is_whole, _COUNT),
    "trials": (is_whole, _COUNT),
    "budget": (is_whole, _COUNT),
    "full_trials": (lambda v: is_whole(v, 0), _COUNT),
    "until": (is_positive, "Give octaves, such as 1.0, or leave it out."),
    "batch": (is_positive, "Give a positive number, or leave it out."),
    "warmup": (_is_share, "Give a share of the steps, 0 to 1, or leave it out."),
    "seed": (
        lambda v: is_whole(v, 0) and v < 2**32,
        "Give a whole number from 0 to 2³² - 1.",
    ),
    "name": (_is_name, "Give a name of printable characters, such as 'digits'."),
}
_OPTIONAL = {"target_steps", "trials", "budget", "until", "batch", "warmup"}


def check_argument(name: str, value: object) -> None:
    """Raise a `CalibrationError` if a single argument of `calibrate` is impossible."""
    if value is None and name in _OPTIONAL:
        return
    fits, cure = _CHECKS[name]
    if not fits(value):
        raise CalibrationError(f"{name} is {value!r}.", cure, name)


def octaves(lr_range: Any) -> tuple[float, float] | None:
    """Return log2 of the two rates of `lr_range`."""
    if lr_range is None:
        return None
    low = high = 1.0
    if (
        isinstance(lr_range, Sequence)
        and not isinstance(lr_range, str)
        and len(lr_range) == 2
    ):
        low, high = (check_lr(lr, "lr_range") for lr in lr_range)
    if low >= high:
        raise CalibrationError(
            f"lr_range is {lr_range!r}.", "Give two rates, the lower first.", "lr_range"
        )
    return math.log2(low), math.log2(high)
