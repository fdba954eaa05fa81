"""Optimizer settings as plain values, and the differences of two tables of values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._checks import is_number, plain_lr
from .._optimizers import defaults_of
from ._constants import SAME

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Settings that do not change the updates.
SAME_UPDATES = {"foreach", "fused", "capturable", "differentiable"}


def settings_of(
    groups: Sequence[Mapping[str, Any]], names: Iterable[str]
) -> dict[str, Any]:
    """Return the settings `names` of parameter groups. If the groups differ in one, its value is a
    list.
    """
    made = {}
    for name in names:
        values = [plain_value(group[name]) for group in groups]
        apart = [value for i, value in enumerate(values) if value not in values[:i]]
        made[name] = apart if len(apart) > 1 else apart[0]
    return made


def plain_value(value: Any) -> Any:
    """Return a setting as a JSON value. An object that JSON cannot hold becomes its repr without
    the memory address.
    """
    value = plain_lr(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(own) for own in value]
    if hasattr(value, "tolist"):  # torch and numpy
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def agreed(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the union of the tables, without keys for which two tables differ."""
    made: dict[str, Any] = {}
    apart: set[str] = set()
    for table in tables:
        for key, value in table.items():
            if made.setdefault(key, value) != value:
                apart.add(key)
    return {key: value for key, value in made.items() if key not in apart}


def constructor_settings(
    settings: Mapping[str, Any], optimizer: type[Optimizer]
) -> dict[str, Any]:
    """Return those settings that an optimizer's constructor takes, so that `**settings` gives them
    again. A value in which groups differed, and an object that became a text, is none.
    """
    made: dict[str, Any] = {}
    for name, default in defaults_of(optimizer).items():
        value = settings.get(name)
        if isinstance(default, (list, tuple)):
            many = value if isinstance(value, (list, tuple)) else ()
            if len(many) == len(default) and all(map(is_number, many)):
                made[name] = tuple(many)
        elif isinstance(value, str if isinstance(default, str) else (bool, int, float)):
            made[name] = value
    return made


def differences(
    stored: Mapping[str, Any], mine: Mapping[str, Any], tolerance: float = SAME
) -> str:
    """Return the differing values of common keys, as "steps=10, not 20; batch=8, not 16"; "" if
    there are none.
    """
    both = [(key, stored[key], mine[key]) for key in mine if key in stored]
    return "; ".join(
        f"{key}={was!r}, not {now!r}"
        for key, was, now in both
        if not _is_alike(was, now, tolerance)
    )


def _is_alike(a: Any, b: Any, tolerance: float) -> bool:
    if is_number(a) and is_number(b) and isinstance(a + b, float):
        return math.isclose(a, b, rel_tol=tolerance)
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(
            _is_alike(a[key], b[key], tolerance) for key in a
        )
    return bool(a == b)
