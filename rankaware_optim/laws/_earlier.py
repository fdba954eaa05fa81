"""Tables of laws that earlier versions wrote into recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._checks import shown
from ..errors import LawError

_GONE = {"split": False, "floor": "none", "steps": "none"}  # fields that µA had, and their only readable values
_AT_ONE_RANK = ("gradient-like", "spectral")  # families whose rates moved with the rank unless "one-rank" held them


def in_todays_fields(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a law's table with today's names and fields, and with the same rates. Today's tables are unchanged.

    Raises:
        LawError: today's laws give other rates.
    """
    if data.get("name") == "one-rank":
        inner = data.get("law")
        if isinstance(inner, Mapping) and inner.get("name") == "mua" and inner.get("family") in _AT_ONE_RANK:
            return _without_gone(inner)
        raise _gone("'one-rank' around that law")
    if data.get("name") != "mua" or _GONE.keys().isdisjoint(data):
        return data
    if data.get("family") in (*_AT_ONE_RANK, "first-step"):
        raise _gone(f"µA's terms of the rank for {data['family']} optimizers")
    return _without_gone(data)


def _without_gone(table: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in _GONE.items():
        if table.get(name, value) != value:
            raise _gone(f"'mua' with {name}={shown(table[name])}")
    return {name: value for name, value in table.items() if name not in _GONE}


def _gone(what: str) -> LawError:
    return LawError(f"This recipe was made by a law that is gone: {what}.", "Calibrate again, or give lr= and law=.")
