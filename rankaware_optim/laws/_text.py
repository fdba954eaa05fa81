"""This module finds laws by name, describes them in reports, and stores them in recipes."""

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
    """Register a law under its name, so that recipes can store it and load it again.

    A package that provides a law can declare it as an entry point in the group
    "rankaware_optim.laws", and its users then do not need to call this function. Use
    `ra.testing.check_law` to test a law that you have written.

    Args:
        law: the law, with the default values of its parameters. If an equal law is already
            registered, nothing happens.
        remove: whether to remove the law from the registry instead.

    Raises:
        LawError: `law` is not a law, or a different law with the same name is
            already registered.
    """
    _LAWS.register(law, remove=remove)


def get_law(law: str | Law) -> Law:
    """Return the law with the given name and with default parameters.

    Args:
        law: the registered name of a law, or an import path such as "package.module:name",
            which leads to a law or to its class. A `Law` is returned unchanged.

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
        kind = law.__name__
        raise LawError(
            f"law= must be an instance of a law class, but the class {kind} itself was passed.",
            f"Add parentheses: law={kind}().",
        )
    if isinstance(law, str) and ":" in law:
        return _LAWS.load(EntryPoint(law, law, _LAWS.group))
    return registered_law(law)


def registered_law(name: str) -> Law:
    """Return the law that is registered under a name.

    A law is registered if this package contains it, if the user called `register_law`, or
    if an installed package declares it as an entry point. The function imports no other code,
    so the name of the law may come from an untrusted file.
    """
    # `in list(...)` compares by equality and never hashes the name, because a damaged file
    # may contain a list or a table instead of a string.
    laws = _LAWS.known
    if name in list(laws):
        return laws[name]
    points = {point.name: point for point in entry_points(group=_LAWS.group)}
    if name not in list(points):
        unknown, known = shown(name), ", ".join(sorted([*laws, *points]))
        raise LawError(
            f"Unknown law {unknown}: no scaling law is registered under this name.",
            f"Use one of {known}. If you wrote the law, call ra.register_law(law) in every program"
            " that uses its name or reads a recipe with it. On the command line, pass --law"
            " package.module:Class.",
        )
    return _LAWS.load(points[name])


def parameters_of(law: Law) -> dict[str, Field[Any]]:
    """Return the dataclass fields of a law by name, or {} if the law is not a dataclass."""
    return {f.name: f for f in fields(law)} if is_dataclass(law) else {}


def recordable_law(law: str | Law) -> Law:
    """Return the law with the given name after checking that a recipe can store it.

    Raises:
        LawError: the law is unknown, or a different law with the same name is
            already registered.
    """
    law = get_law(law)
    law_to_dict(law)
    return law


# --- words ----------------------------------------------------------------------------------------


def law_title(law: Law) -> str:
    """Return a short description of a law for use in titles and sentences.

    >>> law_title(get_law(DEFAULT_LAW)), law_title(MuA(tokens=4.0))
    ('default law', 'law mua with tokens 4')
    """
    default = law == LAWS[DEFAULT_LAW]
    return "default law" if default else f"law {law_sentence(law)}"


def law_sentence(law: Law) -> str:
    """Return the name of a law and all parameters that differ from their defaults.

    Numbers in the result are rounded to three digits.

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
    """Return the name and the parameters of a law as a dictionary that TOML can store.

    TOML cannot represent a null value, so None is stored as the string "none".

    Raises:
        LawError: the law is not registered, or another law is registered under its name.
    """
    if type(registered_law(law.name)) is not type(law):
        name = law.name
        raise LawError(
            f"The law {law!r} cannot be stored in a recipe, because another law is registered as"
            f" {name!r}.",
            "Change the `name` of the law's class. Then call ra.register_law(law) in the program"
            " that writes the recipe and in every program that reads it.",
        )
    table: dict[str, Any] = {"name": law.name}
    for name in parameters_of(law):
        value = getattr(law, name)
        if isinstance(value, Law):
            value = law_to_dict(value)
        table[name] = "none" if value is None else value
    return table


def law_from_dict(data: Mapping[str, Any]) -> Law:
    """Return the law that a dictionary written by `law_to_dict` describes.

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
        name, parameter = law.name, shown(min(unknown))
        raise LawError(
            f"The recipe's file sets the parameter {parameter} of the law {name!r}, but this law"
            " has no such parameter.",
            "Remove the parameter from the file, or install a newer version of the package that"
            " defines the law.",
        )
    return type(law)(**table)
