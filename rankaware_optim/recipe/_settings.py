"""This module converts optimizer settings to plain values and compares two sets of settings."""

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

# Two settings count as equal within this relative tolerance, about the precision of float32.
SAME = 1e-6
# These settings change how fast an optimizer's step runs, but not the result of the step.
SAME_UPDATES = {"foreach", "fused", "capturable", "differentiable"}


def settings_of(
    groups: Sequence[Mapping[str, object]], names: Iterable[str]
) -> dict[str, object]:
    """Return the settings of an optimizer's parameter groups for the given names.

    If the groups have different values for a setting, the result contains a list of these values
    without repetitions.
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
    """Convert a setting to a value that JSON can store.

    Objects that JSON cannot store are replaced by their repr. The repr's memory address is removed,
    so that the result is the same in every process.
    """
    # Convert to JSON and back, because JSON changes some values (a tuple becomes a list). Without
    # this, a value from a file would differ from the same value in memory.
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> object:
    if hasattr(value, "tolist"):  # torch and numpy
        return value.tolist()
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def without_conflicts(tables: Iterable[Mapping[str, V]]) -> dict[str, V]:
    """Merge several dictionaries and drop the keys that have different values in two of them."""
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
    """Return the settings that the optimizer's constructor accepts as keyword arguments.

    Settings that differ between the parameter groups, and objects that were converted to strings,
    are left out.
    """
    accepted: dict[str, Plain | tuple[Plain, ...]] = {}
    for name, default in defaults_of(optimizer).items():
        value = settings.get(name)
        # Constructors are rarely annotated in full, so the type of the default value is the best
        # evidence for the values that the constructor accepts.
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            if all(map(is_number, value)):
                accepted[name] = tuple(value)
        elif isinstance(value, str if isinstance(default, str) else (bool, int, float)):
            accepted[name] = value
    return accepted


def differences(stored: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Describe the values that differ between two dictionaries, for the keys that both have.

    The result looks like "steps=10, not 20; batch=8, not 16", or is empty if no values differ.
    Floats that only differ by rounding count as equal.
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
