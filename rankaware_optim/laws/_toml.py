"""Laws as TOML tables, also those that earlier versions wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .._checks import is_number, shown
from .._types import Factor, Reference
from ..errors import LawError
from ._law import Law, check_ranges
from ._text import FIRST, LAWS, as_float, parameters_of, value_of

_MOST = 1e30  # largest parameter read from a file; a law may allow less
_ANOTHER_LAW = "pass law= with the recipe's lr= and tuned_at=."


def law_to_dict(law: Law) -> dict[str, Any]:
    """Return a law as plain TOML values: its registered name and its fields. None is written
    "none".
    """
    if _kind_of(law.name) is not type(law):
        raise LawError(
            f"The law {law!r} is not the one registered as {law.name!r}.",
            "Register it under its own name.",
        )
    table: dict[str, Any] = {"name": law.name}
    for f in parameters_of(law):
        value = value_of(law, f)
        if isinstance(value, Law):
            value = law_to_dict(value)
        table[f.name] = "none" if value is None else value
    return table


def law_from_dict(data: Mapping[str, Any], *, depth: int = 8) -> Law:
    """Return the law that `law_to_dict` wrote, in this version or an earlier one.

    Args:
        data: the law's name and parameters.
        depth: how many levels of laws inside laws are accepted.

    Raises:
        LawError: the law or a parameter is unknown or gone, a value is out of range, or the laws
            are nested too deep.
    """
    table = dict(_in_todays_fields(data))
    kind = _kind_of(str(table.pop("name", None)))
    parameters = {f.name: f for f in parameters_of(kind)}
    values = {
        name: f.metadata[FIRST] for name, f in parameters.items() if FIRST in f.metadata
    }
    for key, value in table.items():
        if key not in parameters:
            raise LawError(
                f"The law {kind.name!r} has no parameter {shown(key)}.",
                "Remove it, or update the package.",
            )
        if is_number(value) and not abs(value) <= _MOST:
            raise LawError(
                f"The law {kind.name!r} got {key}={shown(value)}.",
                f"Give a number up to {_MOST:g}.",
            )
        if isinstance(value, Mapping):
            value = _inner_law(value, depth)
        values[key] = None if value == "none" else as_float(value, parameters[key])
    return kind(**values)


def _inner_law(data: Mapping[str, Any], depth: int) -> Law:
    if not depth:
        raise LawError("The laws are nested too deep.", "Remove some of them.")
    return law_from_dict(data, depth=depth - 1)


def _kind_of(name: str) -> type[Law]:
    """Return the class of a law that a file names: ours, or that of an installed entry point. A
    module is not imported.

    Raises:
        LawError: there is no such law.
    """
    if name == Measured.name:
        return Measured
    try:
        factory = LAWS.get(name)
    except LawError as error:
        raise LawError(
            f"Unknown law {shown(name)}.",
            f"Install it as an entry point of 'rankaware_optim.laws', or {_ANOTHER_LAW}",
        ) from error
    return type(factory())


# --- laws and fields that this package had once, and that recipes still hold ----------------------

# Fields that µA had, and the only values of them that today's law has too.
_GONE = {"split": False, "floor": "none", "steps": "none"}
# Families whose rates moved with the rank unless "one-rank" held them.
_AT_ONE_RANK = ("gradient-like", "spectral")


@dataclass(frozen=True)
class Measured(Law):
    """The law of former recipes that ran a few steps of the optimizer which the file names. Nothing
    is run any more.

    Its parameters are kept as they were, so that the recipe's hash stays.
    """

    tokens: int = 8
    steps: int = 16
    seed: int = 0
    target: float = 1.0
    ratio: float = 1.0
    optimizer: str = "torch.optim.adamw:AdamW"
    settings: str = "{}"
    name: ClassVar[str] = "measured"

    def __post_init__(self) -> None:
        check_ranges(self, "ratio")

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        if not _is_at(factor, reference):
            raise LawError(
                "The law 'measured' is no longer part of this package, so its recipes have one"
                " rate.",
                f"Calibrate again, or {_ANOTHER_LAW}",
            )
        return self.ratio if factor.role == "B" else 1.0


def _is_at(factor: Factor, reference: Reference) -> bool:
    """Return whether a factor has the reference's configuration."""
    at = reference.as_factor()
    pairs = [(factor.fan_in, reference.fan_in or factor.fan_in)]
    if at.role == "full" or factor.role == "full":
        same = at.role == factor.role
    else:
        same = (factor.init == "B") == (at.init == "B")
        pairs += [(factor.rank or 0, at.rank or 0), (factor.scaling, at.scaling)]
    return same and all(
        math.isclose(here, there, rel_tol=1e-6) for here, there in pairs
    )


def _in_todays_fields(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a law's table with today's names and fields, and with the same rates. Today's tables
    are unchanged.

    Raises:
        LawError: today's laws give other rates.
    """
    if data.get("name") == "one-rank":
        data = _mua_at_one_rank(data.get("law"))
    elif data.get("name") != "mua" or _GONE.keys().isdisjoint(data):
        return data
    elif data.get("family") in (*_AT_ONE_RANK, "first-step"):
        raise _gone(f"µA's terms of the rank for {data['family']} optimizers")
    for name, value in _GONE.items():
        if data.get(name, value) != value:
            raise _gone(f"'mua' with {name}={shown(data[name])}")
    return {name: value for name, value in data.items() if name not in _GONE}


def _mua_at_one_rank(inner: Any) -> Mapping[str, Any]:
    mua = inner if isinstance(inner, Mapping) and inner.get("name") == "mua" else {}
    if mua.get("family") not in _AT_ONE_RANK:
        raise _gone("'one-rank' around that law")
    return mua


def _gone(what: str) -> LawError:
    return LawError(
        f"This recipe was made by a law that is gone: {what}.",
        f"Calibrate again, or {_ANOTHER_LAW}",
    )
