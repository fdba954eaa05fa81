"""Optimizer settings as plain values, and the differences of two tables of values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .._checks import is_number
from .._optimizers import defaults_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

V = TypeVar("V")
Plain = bool | int | float | str  # a setting that TOML can hold

SAME = 1e-6  # relative tolerance between equal settings, about the precision of float32
# Settings that change how fast an optimizer steps, but not its updates.
SAME_UPDATES = {"foreach", "fused", "capturable", "differentiable"}


def settings_of(
    groups: Sequence[Mapping[str, object]], names: Iterable[str]
) -> dict[str, object]:
    """Return the settings `names` of parameter groups. A setting in which the groups differ becomes
    the list of its values, each once.
    """
    settings = {}
    for name in names:
        values: list[object] = []
        for group in groups:
            value = plain_value(group[name])
            if value not in values:
                values.append(value)
        settings[name] = values if len(values) > 1 else values[0]
    return settings


def plain_value(value: object) -> Any:
    """Return a setting as a JSON value. An object that JSON cannot hold becomes its repr, without
    the memory address, so that it is the same in every process.
    """
    # Through JSON and back, so that a stored value and a new one can be compared.
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> object:
    if hasattr(value, "tolist"):  # torch and numpy
        return value.tolist()
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def without_conflicts(tables: Iterable[Mapping[str, V]]) -> dict[str, V]:
    """Return the union of the tables, without the keys for which two tables differ."""
    union: dict[str, V] = {}
    differing = set()
    for table in tables:
        for key, value in table.items():
            if union.setdefault(key, value) != value:
                differing.add(key)
    return {key: union[key] for key in union if key not in differing}


def constructor_settings(
    settings: Mapping[str, object], optimizer: type[Optimizer]
) -> dict[str, Plain | tuple[Plain, ...]]:
    """Return the settings that can be passed to the optimizer's constructor again as `**settings`.

    Settings in which the groups differed, and objects that became strings, are left out.
    """
    accepted: dict[str, Plain | tuple[Plain, ...]] = {}
    for name, default in defaults_of(optimizer).items():
        value = settings.get(name)
        # The type of the default is the only hint at the values that the constructor accepts.
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            if all(map(is_number, value)):
                accepted[name] = tuple(value)
        elif isinstance(value, str if isinstance(default, str) else (bool, int, float)):
            accepted[name] = value
    return accepted


def differences(stored: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return the values that differ between common keys, as "steps=10, not 20; batch=8, not 16",
    and "" if there are none. Floats that differ by rounding are equal.
    """
    words = []
    for key, mine in now.items():
        theirs = stored.get(key, mine)
        is_equal = theirs == mine
        if is_number(theirs) and is_number(mine) and isinstance(theirs + mine, float):
            is_equal = math.isclose(theirs, mine, rel_tol=SAME)
        if not is_equal:
            words.append(f"{key}={theirs!r}, not {mine!r}")
    return "; ".join(words)
