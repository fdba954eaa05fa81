"""Scaling laws: how the best learning rate moves with rank, scaling, init, width and method. Pure
arithmetic, no torch.

A law has one method, `Law.multiplier(factor, reference)`: the number by which the rate tuned at
`reference` is multiplied for `factor`. The base rate is that of the reference's A factor. Laws are
frozen dataclasses whose arguments all have defaults, so that a recipe's TOML can hold them.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

from .._checks import is_number, is_positive, is_within, range_of, shown
from .._registry import Registry
from .._types import Factor, Reference
from ..errors import LawError, RankAwareError

LAWS = Registry("rankaware_optim.laws", "law", LawError)
LAWS.register("mua", "rankaware_optim.laws._mua:MuA")
LAWS.register("mua-paper", "rankaware_optim.laws._mua:paper")
LAWS.register("constant", "rankaware_optim.laws._constant:Constant")
LAWS.register("loraplus", "rankaware_optim.laws._constant:LoRAPlus")
LAWS.register("power", "rankaware_optim.laws._corrections:Power")
LAWS.register("falling", "rankaware_optim.laws._corrections:Falling")
DEFAULT_LAW = "falling"
PRIOR_LAW = "mua"  # of a calibration
# key of a field's metadata: its first default, which files that lack the field and tags still use
FIRST = "first"
_FAR = 1e4
_MOST = 1e30  # largest parameter read from a file; a law may allow less


class Law(ABC):
    """A scaling law. Subclass it as a frozen dataclass, give every field a default, and write
    `multiplier`.

    Init[A] means that A is drawn and B starts at zero, as in PEFT. Init[B] means that B is drawn
    and A starts at zero.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class InverseRank(Law):
    ...     name = "inverse-rank"
    ...     def multiplier(self, factor, reference):
    ...         return reference.rank / factor.rank if factor.rank and reference.rank else 1.0
    >>> InverseRank().multiplier(Factor("w", "A", 32, 64, 64), Reference(rank=16, alpha=16, fan_in=64))
    0.5
    """

    name: ClassVar[str] = ""

    @property
    def falls_with_rank(self) -> bool:
        """Whether the law lowers the rates of Init[B] with the rank. A calibration then expects no
        further fall.
        """
        return False

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        """Return the law for an optimizer; by default the law itself.

        Args:
            optimizer_class: the torch optimizer's class.
            settings: its settings other than the learning rate, by name.
        """
        return self

    def batch_multiplier(self, ratio: float) -> float:
        """Return the factor of every rate for a batch of another size; by default 1.

        Args:
            ratio: the batch divided by the reference's batch, dimensionless.
        """
        return 1.0

    @abstractmethod
    def multiplier(self, factor: Factor, reference: Reference) -> float:
        """Return the ratio of `factor`'s rate to the base rate.

        Args:
            factor: the matrix whose rate is wanted.
            reference: the configuration of the base rate, with its `fan_in` known
                (`Reference.resolve`).

        Returns:
            A positive finite number, dimensionless.
        """


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
    name, parameters = (part.strip() for part in law.partition("?")[::2])
    made = _made(name)
    if not isinstance(made, Law):
        raise LawError(
            f"{name!r} is a {type(made).__name__}, not a Law.",
            "Derive it from rankaware_optim.Law.",
        )
    values = dict(_parameter(made, part) for part in _parted(parameters))
    if not values:
        return made
    if not is_dataclass(made):
        raise LawError(
            f"The law {name!r} has no parameters to set.",
            "Make it a dataclass, or leave out the '?'.",
        )
    return replace(made, **values)


def _made(name: str) -> Any:
    package, colon, attribute = name.partition(":")
    factory = None if colon else LAWS.get(name)
    try:
        found: Any = factory or getattr(import_module(package), attribute)
        return found() if factory or isinstance(found, type) else found
    except (
        Exception,
        SystemExit,
    ) as error:  # third-party code may raise anything when it is imported or called
        raise LawError(
            f"The law {name!r} cannot be loaded: {error}.",
            "Give 'package.module:Class', importable from here.",
        ) from error


def _parted(text: str) -> list[str]:
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
    known: list[str] = [f.name for f in fields(law)] if is_dataclass(law) else []
    if not equals or key not in known:
        raise LawError(
            f"The law {law.name!r} has no parameter {key!r}.",
            f"It has {', '.join(known) or 'none'}; write them as in 'mua?tokens=16'.",
        )
    if key == "law":
        return key, get_law(text.removeprefix("(").removesuffix(")"))
    plain = {"none": None, "true": True, "false": False}
    if text.lower() in plain:
        return key, plain[text.lower()]
    try:
        return key, float(text)
    except ValueError:
        return key, text


def law_changes(law: Law) -> dict[str, Any]:
    """Return a law's name and the parameters that differ from their first defaults. Recipes are
    hashed by these.

    Inner laws are always named. A parameter that a later version adds therefore changes no hash.
    """
    kept = {
        name: value
        for name, value, changed in _parameters(law, FIRST)
        if changed or isinstance(value, Law)
    }
    return {
        "name": law.name,
        **{k: law_changes(v) if isinstance(v, Law) else v for k, v in kept.items()},
    }


def law_words(law: Law) -> str:
    """Return a law as text: its class and the parameters that differ from their defaults, as
    "MuA(tokens=4.0)".
    """
    words = []
    for name, value, changed in _parameters(law):
        short = float(f"{value:.4g}") if isinstance(value, float) else value
        words += (
            [f"{name}={law_words(value) if isinstance(value, Law) else repr(short)}"]
            if changed
            else []
        )
    return f"{type(law).__name__}({', '.join(words)})"


def law_sentence(law: Law) -> str:
    """A law by its name and what differs from its defaults, to three digits, for people.

    >>> law_sentence(get_law("power?exponent=0.1,law=(mua?tokens=4)"))
    'power with exponent 0.1, law (mua with tokens 4)'
    """
    words = []
    for name, value, changed in _parameters(law):
        short = (
            f"({law_sentence(value)})"
            if isinstance(value, Law)
            else f"{value:.3g}"
            if is_number(value)
            else value
        )
        words += [f"{name} {short}"] if changed else []
    return f"{law.name} with {', '.join(words)}" if words else law.name


def _parameters(law: Law, which: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield a law's parameters: name, value, and whether the value differs from the default.

    which: the metadata key of another default to compare with, such as `FIRST`.
    """
    known: tuple[Field[Any], ...] = fields(law) if is_dataclass(law) else ()
    for f in known:
        value = _as_float(getattr(law, f.name), f)
        default = (
            f.default_factory() if callable(f.default_factory) else f.metadata.get(which, f.default)
        )
        yield f.name, value, value != default


def _as_float(value: Any, of: Field[Any]) -> Any:
    """Return a parameter's value, as a float if its default is one. A power of Python ints could
    grow without bound.
    """
    return float(value) if is_number(value) and isinstance(of.default, float) else value


def checked_multiplier(law: Law, factor: Factor, reference: Reference) -> float:
    """Return `law.multiplier(factor, reference)`, checked to be a positive finite number.

    A value within rounding error of 1 becomes 1. The reference's own configuration then keeps its
    rate bit for bit.

    Raises:
        LawError: the law failed, or returned something else.
    """
    value = _answer(law, "multiplier", factor, reference)
    value = _usable(law, value, factor.name or factor.role)
    return 1.0 if math.isclose(value, 1.0, rel_tol=1e-12) else value


def innermost(law: Law) -> Law:
    """Return the law inside all correcting laws; the law itself if it corrects none."""
    inner = getattr(law, "law", None)
    return innermost(inner) if isinstance(inner, Law) else law


def caution_of(multiplier: float) -> str:
    """Return a warning text for a multiplier outside 1e-4 to 1e4, else "". Usual ranks and alphas
    stay inside.
    """
    if 1 / _FAR <= multiplier <= _FAR:
        return ""
    return (
        f"The law multiplies the rate by {multiplier:.3g}, beyond {1 / _FAR:g} to {_FAR:g}: look at"
        " ranks and alphas."
    )


def checked_batch_multiplier(law: Law, ratio: float) -> float:
    """Return `law.batch_multiplier(ratio)`; raise a `LawError` if it is not a positive finite
    number.
    """
    return _usable(law, _answer(law, "batch_multiplier", ratio), f"{ratio:g} times the batch")


def _usable(law: Law, value: object, what: str) -> float:
    if not is_positive(value) or value > sys.float_info.max:
        raise LawError(
            f"The law {law!r} gave {value!r} as the multiplier of {what}.",
            "A multiplier is a positive finite number: fix the law, or choose another by law=.",
        )
    return float(value)


def bound_law(law: Law, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
    """Return `law.bind(optimizer_class, settings)`; raise a `LawError` if that is not a law."""
    bound = _answer(law, "bind", optimizer_class, settings)
    if not isinstance(bound, Law):
        raise LawError(
            f"The law {law!r} gave {bound!r} when it was bound.",
            "Return a law, by default the law itself.",
        )
    return bound


def _answer(law: Law, method: str, *question: Any) -> Any:
    """Call a method of a law, which may be third-party code. Whatever it raises becomes a
    `LawError`.
    """
    try:
        return getattr(law, method)(*question)
    except (RankAwareError, Warning):
        raise
    except Exception as error:
        raise LawError(
            f"The law {law!r} failed in {method}(): {error!r}.",
            "Fix the law, or choose another by law=.",
        ) from error


def law_to_dict(law: Law) -> dict[str, Any]:
    """Return a law as plain TOML values: its registered name and its fields. None is written
    "none".
    """
    if _kind_of(law.name) is not type(law):
        raise LawError(
            f"The law {law!r} is not the one registered as {law.name!r}.",
            "Register it under its own name.",
        )
    values = {f.name: getattr(law, f.name) for f in fields(law)}  # type: ignore[arg-type]
    plain = {
        k: law_to_dict(v) if isinstance(v, Law) else "none" if v is None else v
        for k, v in values.items()
    }
    return {"name": law.name, **plain}


def law_from_dict(data: Mapping[str, Any], *, depth: int = 8) -> Law:
    """Return the law that `law_to_dict` wrote, in this version or an earlier one.

    Args:
        data: the law's name and parameters.
        depth: how many levels of laws inside laws are accepted.

    Raises:
        LawError: the law or a parameter is unknown or gone, a value is out of range, or the laws
            are nested too deep.
    """
    from ._former import in_todays_fields

    data = in_todays_fields(data)
    kind = _kind_of(str(data.get("name")))
    known = {f.name: f for f in fields(kind)}
    values = {name: f.metadata[FIRST] for name, f in known.items() if FIRST in f.metadata}
    for key, value in data.items():
        if key == "name":
            continue
        if key not in known:
            raise LawError(
                f"The law {kind.name!r} has no parameter {shown(key)}.",
                "Remove it, or update the package.",
            )
        if isinstance(value, Mapping):
            if not depth:
                raise LawError("The laws are nested too deep.", "Remove some of them.")
            value = law_from_dict(value, depth=depth - 1)
        elif is_number(value) and not abs(value) <= _MOST:
            raise LawError(
                f"The law {kind.name!r} got {key}={shown(value)}.",
                f"Give a number up to {_MOST:g}.",
            )
        values[key] = None if value == "none" else _as_float(value, known[key])
    made: Law = kind(**values)
    return made


def _kind_of(name: str) -> type[Any]:
    """Return the class of a law that a file names: ours, or that of an installed entry point. A
    module is not imported.

    Raises:
        LawError: there is no such law.
    """
    from ._former import Measured

    if name == Measured.name:
        return Measured
    try:
        factory = LAWS.get(name)
    except LawError as error:
        raise LawError(
            f"Unknown law {shown(name)}.",
            "Install it as an entry point of 'rankaware_optim.laws', or pass law= with the recipe's"
            " lr= and tuned_at=.",
        ) from error
    return type(factory())


def check_parameters(law: Law, *names: str) -> None:
    """Raise a `LawError` if one of these parameters is outside the range for its name."""
    for name in names:
        value = getattr(law, name)
        if not is_within(name, value):
            raise LawError(
                f"The law {law.name!r} got {name}={shown(value)}.", f"Give {range_of(name)}."
            )


def check_law(law: Law, inner: object) -> None:
    if not isinstance(inner, Law):
        raise LawError(
            f"The law {law.name!r} got law={inner!r}.", "Give a Law instance, such as MuA()."
        )


def check_choice(law: Law, name: str, choices: Iterable[object]) -> None:
    value, choices = getattr(law, name), tuple(choices)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        known = ", ".join(map(repr, choices))
        raise LawError(f"The law {law.name!r} got {name}={value!r}.", f"Give one of {known}.")
