"""Laws as texts: the names by which they are found, and the words by which reports tell them
apart.
"""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass, replace
from importlib import import_module
from typing import Any

from .._checks import is_number
from .._registry import Registry
from ..errors import LawError
from ._law import Law

LAWS = Registry("rankaware_optim.laws", "law", LawError)
LAWS.register("mua", "rankaware_optim.laws:MuA")
LAWS.register("mua-paper", "rankaware_optim.laws._mua:paper")
LAWS.register("constant", "rankaware_optim.laws:Constant")
LAWS.register("loraplus", "rankaware_optim.laws:LoRAPlus")
LAWS.register("power", "rankaware_optim.laws:Power")
LAWS.register("falling", "rankaware_optim.laws:Falling")
DEFAULT_LAW = "falling"
PRIOR_LAW = "mua"  # of a calibration
# key of a field's metadata: its first default, which files that lack the field and tags still use
FIRST = "first"
_WORDS = {"none": None, "true": True, "false": False}


def get_law(law: str | Law) -> Law:
    """Return a law from its text: a registered name or "package.module:name", with parameters after
    a "?".

    Args:
        law: the text, or a `Law`, which is returned unchanged. Parameters are separated by commas.
            A value is a number, true, false, none, a text or another law. Put that law in brackets
            if it has parameters too. The name after the colon is that of a class or of an instance.

    Raises:
        LawError: the law is unknown, cannot be imported, or has no such parameter.

    >>> get_law("mua?tokens=16").tokens
    16.0
    >>> get_law("power?exponent=-1,law=constant").law
    Constant()
    >>> get_law("power?law=(mua?tokens=none)").law.tokens is None
    True
    """
    if isinstance(law, Law):
        return law
    if not isinstance(law, str):
        raise LawError(
            f"A law is a name or a Law instance, not {law!r}.",
            f"Known are {', '.join(LAWS.names())}.",
        )
    name, _, parameters = law.partition("?")
    named = _named(name.strip())
    values = dict(_parameter(named, part) for part in _split(parameters))
    return replace(named, **values) if values else named  # type: ignore[type-var]


def _named(name: str) -> Law:
    package, colon, attribute = name.partition(":")
    factory = None if colon else LAWS.get(name)
    try:
        law: Any = factory() if factory else getattr(import_module(package), attribute)
        law = law() if isinstance(law, type) else law
    except (Exception, SystemExit) as error:  # third-party code may raise anything
        raise LawError(
            f"The law {name!r} cannot be loaded: {error}.",
            "Give 'package.module:Class', importable from here.",
        ) from error
    if not isinstance(law, Law):
        raise LawError(
            f"{name!r} is a {type(law).__name__}, not a Law.",
            "Derive it from rankaware_optim.Law.",
        )
    return law


def _split(text: str) -> list[str]:
    """Split `text` at the commas outside brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part for part in parts if part.strip()]


def _parameter(law: Law, part: str) -> tuple[str, Any]:
    key, equals, text = (piece.strip() for piece in part.partition("="))
    known = [f.name for f in parameters_of(law)]
    if not equals or key not in known:
        raise LawError(
            f"The law {law.name!r} has no parameter {key!r}.",
            f"It has {', '.join(known) or 'none'}; write them as in 'mua?tokens=16'.",
        )
    if key == "law":
        return key, get_law(text.removeprefix("(").removesuffix(")"))
    if text.lower() in _WORDS:
        return key, _WORDS[text.lower()]
    try:
        return key, float(text)
    except ValueError:
        return key, text


# --- what differs from the defaults ---------------------------------------------------------------


def law_changes(law: Law) -> dict[str, Any]:
    """Return a law's name and the parameters that differ from their first defaults. Recipes are
    hashed by these.

    Inner laws are always named. A parameter that a later version adds therefore changes no hash.
    """
    changes: dict[str, Any] = {"name": law.name}
    for f in parameters_of(law):
        value = value_of(law, f)
        if isinstance(value, Law):
            changes[f.name] = law_changes(value)
        elif value != _default_of(f, FIRST):
            changes[f.name] = value
    return changes


def law_title(law: Law) -> str:
    """Return a law in the words of a title.

    >>> law_title(get_law(DEFAULT_LAW)), law_title(get_law("mua?tokens=4"))
    ('default law', 'law mua with tokens 4')
    """
    default = law == get_law(DEFAULT_LAW)
    return "default law" if default else f"law {law_sentence(law)}"


def law_sentence(law: Law) -> str:
    """A law by its name and what differs from its defaults, to three digits, for people.

    >>> law_sentence(get_law("power?exponent=0.1,law=(mua?tokens=4)"))
    'power with exponent 0.1, law (mua with tokens 4)'
    """

    changes = []
    for f in parameters_of(law):
        value = value_of(law, f)
        if value != _default_of(f):
            changes.append(f"{f.name} {_word(value)}")
    return f"{law.name} with {', '.join(changes)}" if changes else law.name


def _word(value: Any) -> str:
    if isinstance(value, Law):
        return f"({law_sentence(value)})"
    return f"{value:.3g}" if is_number(value) else str(value)


def parameters_of(law: Law | type[Law]) -> tuple[Field[Any], ...]:
    """Return a law's fields; none if it is no dataclass."""
    return fields(law) if is_dataclass(law) else ()


def value_of(law: Law, parameter: Field[Any]) -> Any:
    return as_float(getattr(law, parameter.name), parameter)


def _default_of(parameter: Field[Any], key: str = "") -> Any:
    """Return a parameter's default. `key`: the metadata key of another default, such as `FIRST`."""
    if callable(parameter.default_factory):
        return parameter.default_factory()
    return parameter.metadata.get(key, parameter.default)


def as_float(value: Any, parameter: Field[Any]) -> Any:
    """Return a parameter's value, as a float if its default is one. A power of Python ints could
    grow without bound.
    """
    return (
        float(value)
        if is_number(value) and isinstance(parameter.default, float)
        else value
    )
