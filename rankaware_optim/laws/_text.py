"""Laws as texts: their names, the words of reports, and the tables of recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .._checks import is_number, shown
from .._registry import Registry
from ..errors import LawError
from ._law import Constant, Law, LoRAPlus
from ._mua import Falling, MuA, Power

LAWS: dict[str, Law] = {
    "mua": MuA(),
    "mua-paper": MuA(tokens=None),
    "constant": Constant(),
    "loraplus": LoRAPlus(),
    "power": Power(),
    "falling": Falling(),
}
DEFAULT_LAW = "falling"
PRIOR_LAW = "mua"  # of a calibration
_LAWS = Registry[Law](Law, "rankaware_optim.laws", LAWS, LawError)  # type: ignore[type-abstract]


def register_law(law: Law, *, remove: bool = False) -> None:
    """Add a law under its name, so that a recipe can record it and be read again.

    A package can register a law for its users by an entry point in the group
    "rankaware_optim.laws". `check_law` tests a law.

    Args:
        law: the law, with the defaults of its parameters. An equal one may be registered again.
        remove: whether to remove the law instead.

    Raises:
        LawError: it is no law, or another one has its name.
    """
    _LAWS.register(law, remove=remove)


def get_law(law: str | Law) -> Law:
    """Return a law from its name, with the defaults of its parameters.

    Args:
        law: a registered name, or "package.module:name" of a law or of its class. A `Law` is
            returned unchanged.

    Raises:
        LawError: the law is unknown or cannot be imported.

    >>> get_law("mua-paper").tokens is None
    True
    >>> get_law("rankaware_optim:Constant")
    Constant()
    """
    if isinstance(law, Law):
        return law
    if isinstance(law, type) and issubclass(law, Law):
        raise LawError(
            f"The class {law.__name__} is not a Law, but a kind of them.",
            f"Pass an instance as the law: {law.__name__}().",
        )
    if isinstance(law, str) and ":" in law:
        return _LAWS.load(EntryPoint(law, law, _LAWS.group))
    return registered_law(law)


def registered_law(name: str) -> Law:
    """Return the law of a registered name: ours, or that of an installed entry point. A module is
    not imported by its name, so that a file may give the name.
    """
    laws = _LAWS.known
    if name in list(laws):
        return laws[name]
    points = {point.name: point for point in entry_points(group=_LAWS.group)}
    if name not in list(points):
        raise LawError(
            f"Unknown law {shown(name)}.",
            f"The known laws are {', '.join(sorted([*laws, *points]))}. To add your own, call"
            " ra.register_law(law) where a recipe is made and where it is read (in a shell, pass"
            " --law package.module:Class), or give your package an entry point in the group"
            f" {_LAWS.group!r}.",
        )
    return _LAWS.load(points[name])


def parameters_of(law: Law) -> dict[str, Field[Any]]:
    """Return a law's fields by their names; none if it is no dataclass."""
    return {f.name: f for f in fields(law)} if is_dataclass(law) else {}


def recordable_law(law: str | Law) -> Law:
    """Return a law from its name, as `get_law` does, if a recipe can record it.

    Raises:
        LawError: the law is unknown, or not registered under its own name.
    """
    law = get_law(law)
    law_to_dict(law)
    return law


# --- words ----------------------------------------------------------------------------------------


def law_title(law: Law) -> str:
    """Return a law in the words of a title.

    >>> law_title(get_law(DEFAULT_LAW)), law_title(MuA(tokens=4.0))
    ('default law', 'law mua with tokens 4')
    """
    default = law == LAWS[DEFAULT_LAW]
    return "default law" if default else f"law {law_sentence(law)}"


def law_sentence(law: Law) -> str:
    """Return a law by its name and what differs from its defaults, to three digits.

    >>> law_sentence(Power(exponent=0.1, law=MuA(tokens=4.0)))
    'power with exponent 0.1, law (mua with tokens 4)'
    """
    changes = []
    for name, parameter in parameters_of(law).items():
        value = getattr(law, name)
        factory = parameter.default_factory
        if value == (factory() if callable(factory) else parameter.default):
            continue
        if isinstance(value, Law):
            value = f"({law_sentence(value)})"
        elif is_number(value):
            value = f"{value:.3g}"
        changes.append(f"{name} {value}")
    return f"{law.name} with {', '.join(changes)}" if changes else law.name


# --- tables ---------------------------------------------------------------------------------------


def law_to_dict(law: Law) -> dict[str, Any]:
    """Return a law as plain TOML values: its registered name and its parameters. None is written
    "none".
    """
    if type(registered_law(law.name)) is not type(law):
        raise LawError(
            f"The law {law!r} is not registered as {law.name!r}, so no recipe can record it.",
            "Give it another name, and call register_law() for it, where the recipe is made and"
            " where it is read.",
        )
    table: dict[str, Any] = {"name": law.name}
    for name in parameters_of(law):
        value = getattr(law, name)
        if isinstance(value, Law):
            value = law_to_dict(value)
        table[name] = "none" if value is None else value
    return table


def law_from_dict(data: Mapping[str, Any]) -> Law:
    """Return the law that `law_to_dict` wrote, from its name and parameters.

    Raises:
        LawError: the law or a parameter is unknown, or a value is out of range.
    """
    table = dict(data)
    law = registered_law(str(table.pop("name", None)))
    for name, value in table.items():
        if isinstance(value, Mapping):
            table[name] = law_from_dict(value)
        elif value == "none":
            table[name] = None
    unknown = table.keys() - parameters_of(law)
    if unknown:
        raise LawError(
            f"The law {law.name!r} has no parameter {shown(min(unknown))}.",
            "Remove it, or update the package.",
        )
    return type(law)(**table)
