"""This module converts the settings of an optimizer to plain values, and compares settings."""

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
    """Return the settings with the given names from an optimizer's parameter groups.

    If the groups have different values for a setting, the result contains a list of the different
    values.
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

    An object that JSON cannot store is replaced with its repr. The memory address in the repr is
    removed, because it would be different in every process.
    """
    # Convert to JSON and back, because JSON changes some values (a tuple becomes a list). Without
    # this, a value from a file would differ from the same value in memory.
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> object:
    if hasattr(value, "tolist"):  # torch and numpy
        return value.tolist()
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def without_conflicts(tables: Iterable[Mapping[str, V]]) -> dict[str, V]:
    """Merge several dictionaries, and leave out every key with different values in two of them."""
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
    """Return the settings that can be passed to the optimizer's constructor as keyword arguments.

    The result does not contain settings that differ between the parameter groups, or objects that
    were converted to strings.
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
    """Describe the keys that have different values in two dictionaries.

    An example of a result is "steps=10, not 20; batch=8, not 16". The result is empty if the
    dictionaries do not differ. Floats that differ only by rounding count as equal, and a key that
    only one dictionary contains is ignored.
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
