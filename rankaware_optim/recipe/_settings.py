"""An optimizer's settings as plain values, and how two tables of values differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._checks import is_number, plain_lr

SAME_UPDATES = {"foreach", "fused", "capturable", "differentiable"}  # settings that leave an optimizer's updates alone
SAME = 1e-6  # relative, of numbers: about what float32 keeps of one


def settings_of(groups: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """What parameter groups hold under `names`; where they differ in one, the list of its values."""
    made = {}
    for name in names:
        values = [plain_value(group[name]) for group in groups]
        apart = [value for i, value in enumerate(values) if value not in values[:i]]
        made[name] = apart if len(apart) > 1 else apart[0]
    return made


def plain_value(value: Any) -> Any:
    """A setting as JSON holds it. An object without values of its own is named by its text, without its address."""
    value = plain_lr(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(own) for own in value]
    if hasattr(value, "tolist"):  # of torch and numpy
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def plain_setting(value: Any) -> Any:
    """An optimizer's setting as TOML can hold it; what it cannot is written as Python would show it."""
    if isinstance(value, (list, tuple)):
        return [plain_setting(v) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def agreed(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every table that has a key has under it; a key in which two differ is left out."""
    made: dict[str, Any] = {}
    for table in tables:
        made = {**table, **made}
    return {key: value for key, value in made.items() if all(table.get(key, value) == value for table in tables)}


def differences(stored: Mapping[str, Any], mine: Mapping[str, Any], tolerance: float = SAME) -> str:
    """What both hold and differs, as "steps=10, not 20; batch=8, not 16"; empty where nothing does."""
    both = [(key, stored[key], mine[key]) for key in mine if key in stored]
    return "; ".join(f"{key}={was!r}, not {now!r}" for key, was, now in both if not _is_alike(was, now, tolerance))


def _is_alike(a: Any, b: Any, tolerance: float) -> bool:
    if is_number(a) and is_number(b):
        return a == b or (isinstance(a + b, float) and math.isclose(a, b, rel_tol=tolerance))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_is_alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_alike(a[key], b[key], tolerance) for key in a)
    return bool(a == b)
