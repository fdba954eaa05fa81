"""Optimizer settings as plain values, and the differences of two tables of values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._checks import is_number
from .._optimizers import defaults_of
from .._rate import Rate

if TYPE_CHECKING:
    from torch.optim import Optimizer

SAME = 1e-6  # relative tolerance of settings, about float32's precision
# Settings that do not change the updates.
SAME_UPDATES = {"foreach", "fused", "capturable", "differentiable"}


def settings_of(
    groups: Sequence[Mapping[str, Any]], names: Iterable[str]
) -> dict[str, Any]:
    """Return the settings `names` of parameter groups. If the groups differ in one, its value is a
    list.
    """
    settings = {}
    for name in names:
        values: list[Any] = []
        for group in groups:
            value = plain_value(group[name])
            if value not in values:
                values.append(value)
        settings[name] = values if len(values) > 1 else values[0]
    return settings


def plain_value(value: Any) -> Any:
    """Return a setting as a JSON value. An object that JSON cannot hold becomes its repr without
    the memory address.
    """
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Rate):
        return float(value)
    if hasattr(value, "tolist"):  # torch and numpy
        return value.tolist()
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def agreed(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the union of the tables, without keys for which two tables differ."""
    union: dict[str, Any] = {}
    differing = set()
    for table in tables:
        for key, value in table.items():
            if union.setdefault(key, value) != value:
                differing.add(key)
    return {key: union[key] for key in union if key not in differing}


def constructor_settings(
    settings: Mapping[str, Any], optimizer: type[Optimizer]
) -> dict[str, Any]:
    """Return those settings that an optimizer's constructor takes, so that `**settings` gives them
    again. A value in which groups differed, and an object that became a text, is none.
    """
    made: dict[str, Any] = {}
    for name, default in defaults_of(optimizer).items():
        value = settings.get(name)
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            if all(map(is_number, value)):
                made[name] = tuple(value)
        elif isinstance(value, str if isinstance(default, str) else (bool, int, float)):
            made[name] = value
    return made


def differences(stored: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Return the differing values of common keys, as "steps=10, not 20; batch=8, not 16"; "" if
    there are none. Floats differ beyond rounding only.
    """
    words = []
    for key, now in mine.items():
        before = stored.get(key, now)
        is_alike = before == now
        if is_number(before) and is_number(now) and isinstance(before + now, float):
            is_alike = math.isclose(before, now, rel_tol=SAME)
        if not is_alike:
            words.append(f"{key}={before!r}, not {now!r}")
    return "; ".join(words)
