"""Laws as strings: their names, how reports describe them, and how recipes record them."""

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
PRIOR_LAW = "mua"  # the law that a calibration starts from and corrects
_LAWS = Registry[Law](Law, "rankaware_optim.laws", LAWS, LawError)  # type: ignore[type-abstract]


def register_law(law: Law, *, remove: bool = False) -> None:
    """Make a law known by its name, so that a recipe can record it and be read again.

    A package can register a law for its users by an entry point in the group
    "rankaware_optim.laws". `ra.testing.check_law` tests a law.

    Args:
        law: the law, with the default values of its parameters. Registering an equal law again does
            nothing.
        remove: whether to remove the law instead.

    Raises:
        LawError: `law` is not a law, or another law has its name.
    """
    _LAWS.register(law, remove=remove)


def get_law(law: str | Law) -> Law:
    """Return the law of a name, with the default values of its parameters.

    Args:
        law: a registered name, or "package.module:name" of a law or of its class, which is
            imported. A `Law` is returned unchanged.

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
            f"law= is the class {law.__name__}, but it must be an instance.",
            f"Add parentheses: law={law.__name__}().",
        )
    if isinstance(law, str) and ":" in law:
        return _LAWS.load(EntryPoint(law, law, _LAWS.group))
    return registered_law(law)


def registered_law(name: str) -> Law:
    """Return the law that is registered under a name, by this package, by `register_law`, or by the
    entry point of an installed package.

    Nothing else is imported, so that the name may come from a file that is not trusted.
    """
    laws = _LAWS.known
    if name in list(laws):
        return laws[name]
    points = {point.name: point for point in entry_points(group=_LAWS.group)}
    if name not in list(points):
        raise LawError(
            f"Unknown law {shown(name)}.",
            f"The known laws are {', '.join(sorted([*laws, *points]))}. To add your own, call"
            " ra.register_law(law), both where a recipe is made and where it is read. In a shell"
            " pass --law package.module:Class. A package can add one by an entry point in the group"
            f" {_LAWS.group!r}.",
        )
    return _LAWS.load(points[name])


def parameters_of(law: Law) -> dict[str, Field[Any]]:
    """Return a law's fields by name. A law that is not a dataclass has none."""
    return {f.name: f for f in fields(law)} if is_dataclass(law) else {}


def recordable_law(law: str | Law) -> Law:
    """Return the law of a name, as `get_law` does, but only a law that a recipe can record.

    Raises:
        LawError: the law is unknown, or it is not registered under its own name.
    """
    law = get_law(law)
    law_to_dict(law)
    return law


# --- words ----------------------------------------------------------------------------------------


def law_title(law: Law) -> str:
    """Return what a sentence or a title calls a law.

    >>> law_title(get_law(DEFAULT_LAW)), law_title(MuA(tokens=4.0))
    ('default law', 'law mua with tokens 4')
    """
    default = law == LAWS[DEFAULT_LAW]
    return "default law" if default else f"law {law_sentence(law)}"


def law_sentence(law: Law) -> str:
    """Return a law's name and the parameters that differ from their defaults, to three digits.

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
    """Return a law as values that TOML can hold: its registered name and its parameters. None is
    written as "none".
    """
    if type(registered_law(law.name)) is not type(law):
        raise LawError(
            f"The law {law!r} cannot be recorded in a recipe, because another law is registered as"
            f" {law.name!r}.",
            "Change its `name`, and call ra.register_law(law) where the recipe is made and where it"
            " is read.",
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
        LawError: the law or a parameter is unknown, or a value is outside its range.
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
            f"The law {law.name!r} has no parameter called {shown(min(unknown))}.",
            "Remove the parameter, or update the package that defines the law.",
        )
    return type(law)(**table)
