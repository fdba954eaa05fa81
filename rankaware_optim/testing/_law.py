"""Conformance of a law: the properties that the rest of the package relies on, checked on a grid of configurations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import tomli
import tomli_w
import torch

from .._types import Factor, Reference
from ..errors import LawError
from ..laws import LAWS, Law, get_law, law_from_dict, law_to_dict

__all__ = ["LawConformance", "check_law"]

_RANKS = (1, 4, 64)
_INITS = ("A", "B")
_ALPHAS = (16.0, 2.0)

Table = Mapping[tuple[Factor, Reference], float]


_PLAIN = "Let fields be numbers, texts, booleans or laws."


@dataclass(frozen=True)
class LawConformance:
    """What `check_law` found: a law that passed, whether its name leads back to it, how many pairs were asked."""

    law: Law
    registered: bool
    pairs: int

    def __str__(self) -> str:
        name = f"the name {self.law.name!r} leads back to it"
        if not self.registered:
            name = f"{self.law.name!r} is not registered, so no recipe can hold it and TOML was not tried"
        return f"{self.law!r} holds over {self.pairs} pairs of factor and reference; {name}."


def check_law(
    law: str | Law, *, fan_in: float | Iterable[float] = (1.0, 4096.0), tolerance: float = 1e-9
) -> LawConformance:
    """Check that a law, by name or as an instance, keeps what is asked of every law.

    In this order: it is a frozen dataclass whose fields all have defaults; its name is its own; every multiplier is a
    positive finite number, for A, B and whole weights, from LoRA and full finetuning; asked twice it says the same; in
    the other order too; at its own reference it is 1 (A's, or the whole weight's); it composes, a → b → c as a → c; it
    survives TOML, where its name is registered; `bind` gives a law. Asked at ranks 1 to 64, two alphas, both inits
    and each `fan_in` (1 is an embedding's). tolerance: relative, for "1" and "composes"; higher for a measured law.

    Raises:
        LawError: the first property that fails, with the factor and the reference at which it does.

    >>> print(check_law("constant"))
    Constant() holds over 1300 pairs of factor and reference; the name 'constant' leads back to it.
    """
    law = get_law(law)
    _check_form(law)
    registered = _check_name(law)
    widths = (float(fan_in),) if isinstance(fan_in, (int, float)) else tuple(map(float, fan_in))
    references = tuple(_references(widths))
    asked = [(f, at) for at in references for origin in references for f in _factors(origin)]
    table = {pair: _ask(law, *pair) for pair in asked}
    _check_again(law, table, "deterministic", asked)
    _check_again(law, table, "order", asked[::-1])
    _check_own(law, references, table, tolerance)
    _check_composition(law, references, table, tolerance)
    if registered:
        _check_toml(law, table)
    _check_bind(law)
    return LawConformance(law, registered, len(table))


def _failed(check: str, law: Law, cause: str, cure: str) -> LawError:
    return LawError(f"The check {check!r} fails for the law {law!r}: {cause}", cure)


# --- what it is -----------------------------------------------------------------------------------------------------


def _check_form(law: Law) -> None:
    kind: Any = type(law)
    own: Any = vars(kind).get("__dataclass_params__")  # of the class itself: a base's do not cover new fields
    if own is None or not own.frozen:
        raise _failed("form", law, f"{kind.__name__} is no frozen dataclass.", "Put @dataclass(frozen=True) above it.")
    for f in fields(kind):
        if f.init and f.default is MISSING and f.default_factory is MISSING:
            raise _failed("form", law, f"its field {f.name!r} has no default.", "Give every field a default.")


def _check_name(law: Law) -> bool:
    """Whether the law is registered under its name; an error where it has none, or another's."""
    if not law.name or not isinstance(law.name, str):
        raise _failed("name", law, f"its name is {law.name!r}.", "Set name: ClassVar[str] to a short word.")
    if law.name not in LAWS.names():
        return False
    try:
        law_to_dict(law)
    except LawError as error:
        raise _failed("name", law, error.cause, error.cure) from error
    return True


# --- what it answers ------------------------------------------------------------------------------------------------


def _references(widths: Iterable[float]) -> Iterable[Reference]:
    for width in widths:
        yield Reference(method="full", fan_in=width)
        for rank, alpha, init in itertools.product(_RANKS, _ALPHAS, _INITS):
            yield Reference(rank, alpha, init=init, fan_in=width)  # type: ignore[arg-type]


def _factors(at: Reference) -> Iterable[Factor]:
    """The factors of a layer at this configuration: a whole weight, or A and B."""
    own = at.as_factor()
    return (own,) if own.role == "full" else (own, replace(own, role="B"))


def _ask(law: Law, factor: Factor, reference: Reference) -> float:
    where = f"for {_named(factor)}, tuned at {_at(reference)}"
    try:
        value = law.multiplier(factor, reference)
    except Exception as error:  # a stranger's law may raise anything
        raise _failed("positive", law, f"{where}, it raises {error!r}.", "Let it answer for every factor.") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _failed("positive", law, f"{where}, it gives {value!r}.", "A multiplier is a positive finite number.")
    return float(value)


def _named(factor: Factor) -> str:
    return f"{'a whole weight' if factor.role == 'full' else factor.role} at {factor.name}, fan-in {factor.fan_in:g}"


def _at(reference: Reference) -> str:
    return f"{reference}, fan-in {reference.fan_in:g}"


def _check_again(law: Law, table: Table, check: str, order: Iterable[tuple[Factor, Reference]]) -> None:
    for pair in order:
        again = _ask(law, *pair)
        if again != table[pair]:
            factor, reference = pair
            raise _failed(
                check,
                law,
                f"for {_named(factor)}, tuned at {_at(reference)}, it gives {table[pair]!r} and then {again!r}.",
                "Let the answer depend on factor, reference and the law's own fields alone.",
            )


def _check_own(law: Law, references: Iterable[Reference], table: Table, tolerance: float) -> None:
    for at in references:
        value = table[at.as_factor(), at]
        if not math.isclose(value, 1.0, rel_tol=tolerance):
            raise _failed(
                "own reference",
                law,
                f"for {_named(at.as_factor())}, tuned at {_at(at)}, it gives {value!r}.",
                "Divide by the law's rate at the reference: the base rate is that of the reference's A factor.",
            )


def _check_composition(law: Law, references: Iterable[Reference], table: Table, tolerance: float) -> None:
    for a, b, c in itertools.product(references, repeat=3):
        via, direct = table[b.as_factor(), a] * table[c.as_factor(), b], table[c.as_factor(), a]
        if not math.isclose(via, direct, rel_tol=tolerance):
            raise _failed(
                "composes",
                law,
                f"for {_named(c.as_factor())}, tuned at {_at(a)}, it gives {direct:g}, and {via:g} by way of {_at(b)}.",
                "Write the multiplier as a rate at the factor divided by the same rate at the reference.",
            )


# --- where it goes --------------------------------------------------------------------------------------------------


def _check_toml(law: Law, table: Table) -> None:
    try:
        read = law_from_dict(tomli.loads(tomli_w.dumps(law_to_dict(law))))
    except Exception as error:  # tomli_w refuses a value by a TypeError, a law's own check by anything
        raise _failed(
            "toml", law, f"it raises {error!r}.", "Let fields be numbers, texts, booleans or laws."
        ) from error
    if read != law:
        raise _failed("toml", law, f"it is read back as {read!r}.", _PLAIN)
    _check_again(read, table, "toml", table)


def _check_bind(law: Law) -> None:
    bound: object = law.bind(torch.optim.AdamW, {})
    if not isinstance(bound, Law):
        raise _failed("bind", law, f"bind gives {bound!r}.", "Return a law, by default the law itself.")
