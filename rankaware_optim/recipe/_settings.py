"""Optimizer settings as plain values, and the differences of two tables of values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._checks import is_number, plain_lr

# Settings that do not change the updates.
SAME_UPDATES = {"foreach", "fused", "capturable", "differentiable"}
SAME = 1e-6  # relative tolerance of numbers, about float32's precision


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


def plain_setting(value: Any) -> Any:
    """Return an optimizer's setting as a TOML value. What TOML cannot hold becomes its repr."""
    if isinstance(value, (list, tuple)):
        return [plain_setting(v) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def agreed(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the union of the tables, without keys for which two tables differ."""
    made: dict[str, Any] = {}
    for table in tables:
        made = {**table, **made}
    return {
        key: value
        for key, value in made.items()
        if all(table.get(key, value) == value for table in tables)
    }


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
