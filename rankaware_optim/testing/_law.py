"""Conformance of a law: the properties that the rest of the package relies on, checked on a grid of configurations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import tomli
import tomli_w
import torch

from .._types import Factor, Reference
from ..errors import LawError
from ..laws import LAWS, Law, get_law, law_from_dict, law_to_dict

_RANKS = (1, 4, 64)
_INITS = ("A", "B")
_ALPHAS = (16.0, 2.0)

Answers = Mapping[tuple[Factor, Reference], float]


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
    registered = law.name in LAWS.names()
    widths = (float(fan_in),) if isinstance(fan_in, (int, float)) else tuple(map(float, fan_in))
    references = tuple(_references(widths))
    own = [at.as_factor() for at in references]
    factors = [f for a in own for f in ((a,) if a.role == "full" else (a, replace(a, role="B")))]
    pairs = [(f, at) for at in references for f in factors]
    answers = {pair: _ask(law, *pair) for pair in pairs}
    _check_same(law, answers, "deterministic", pairs)
    _check_same(law, answers, "order", pairs[::-1])
    _check_ratios(law, references, answers, tolerance)
    if registered:
        _check_toml(law, answers)
    bound: object = law.bind(torch.optim.AdamW, {})
    if not isinstance(bound, Law):
        raise _failed("bind", law, f"bind gives {bound!r}.", "Return a law, by default the law itself.")
    return LawConformance(law, registered, len(answers))


def _failed(check: str, law: Law, cause: str, cure: str) -> LawError:
    return LawError(f"The check {check!r} fails for the law {law!r}: {cause}", cure)


def _check_form(law: Law) -> None:
    """A frozen dataclass with defaults, whose name is its own."""
    kind: Any = type(law)
    own: Any = vars(kind).get("__dataclass_params__")  # of the class itself: a base's do not cover new fields
    if own is None or not own.frozen:
        raise _failed("form", law, f"{kind.__name__} is no frozen dataclass.", "Put @dataclass(frozen=True) above it.")
    for f in fields(kind):
        if f.init and f.default is MISSING and f.default_factory is MISSING:
            raise _failed("form", law, f"its field {f.name!r} has no default.", "Give every field a default.")
    if not law.name or not isinstance(law.name, str):
        raise _failed("name", law, f"its name is {law.name!r}.", "Set name: ClassVar[str] to a short word.")
    if law.name in LAWS.names():
        try:
            law_to_dict(law)
        except LawError as error:
            raise _failed("name", law, error.cause, error.cure) from error


def _references(widths: Iterable[float]) -> Iterable[Reference]:
    for width in widths:
        yield Reference(method="full", fan_in=width)
        for rank, alpha, init in itertools.product(_RANKS, _ALPHAS, _INITS):
            yield Reference(rank, alpha, init=init, fan_in=width)  # type: ignore[arg-type]


def _ask(law: Law, factor: Factor, reference: Reference) -> float:
    where = _where(factor, reference)
    try:
        value = law.multiplier(factor, reference)
    except Exception as error:  # a stranger's law may raise anything
        raise _failed("positive", law, f"{where}, it raises {error!r}.", "Let it answer for every factor.") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _failed("positive", law, f"{where}, it gives {value!r}.", "A multiplier is a positive finite number.")
    return float(value)


def _where(factor: Factor, reference: Reference) -> str:
    role = "a whole weight" if factor.role == "full" else factor.role
    return f"for {role} at {factor.name}, fan-in {factor.fan_in:g}, tuned at {_at(reference)}"


def _at(reference: Reference) -> str:
    return f"{reference}, fan-in {reference.fan_in:g}"


def _check_same(law: Law, answers: Answers, check: str, order: Iterable[tuple[Factor, Reference]]) -> None:
    """Asked again in this order, the law says the same."""
    for pair in order:
        again = _ask(law, *pair)
        if again != answers[pair]:
            cause = f"{_where(*pair)}, it gives {answers[pair]!r} and then {again!r}."
            raise _failed(
                check, law, cause, "Let the answer depend on factor, reference and the law's own fields alone."
            )


def _check_ratios(law: Law, references: Sequence[Reference], answers: Answers, tolerance: float) -> None:
    """The multiplier is 1 at its own reference, and a → b → c is a → c."""
    for at in references:
        value = answers[at.as_factor(), at]
        if not math.isclose(value, 1.0, rel_tol=tolerance):
            cause = f"{_where(at.as_factor(), at)}, it gives {value!r}."
            cure = "Divide by the law's rate at the reference: the base rate is that of the reference's A factor."
            raise _failed("own reference", law, cause, cure)
    for a, b, c in itertools.product(references, repeat=3):
        via, direct = answers[b.as_factor(), a] * answers[c.as_factor(), b], answers[c.as_factor(), a]
        if not math.isclose(via, direct, rel_tol=tolerance):
            cause = f"{_where(c.as_factor(), a)}, it gives {direct:g}, and {via:g} by way of {_at(b)}."
            cure = "Write the multiplier as a rate at the factor divided by the same rate at the reference."
            raise _failed("composes", law, cause, cure)


def _check_toml(law: Law, answers: Answers) -> None:
    plain = "Let fields be numbers, texts, booleans or laws."
    try:
        read = law_from_dict(tomli.loads(tomli_w.dumps(law_to_dict(law))))
    except Exception as error:  # tomli_w refuses a value by a TypeError, a law's own check by anything
        raise _failed("toml", law, f"it raises {error!r}.", plain) from error
    if read != law:
        raise _failed("toml", law, f"it is read back as {read!r}.", plain)
    _check_same(read, answers, "toml", answers)
