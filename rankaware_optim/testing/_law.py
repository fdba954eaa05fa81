"""Conformance of a law: the properties on which the package relies, checked on a grid of
configurations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

import tomli
import tomli_w
import torch

from .._checks import is_positive
from .._types import Factor, Reference
from ..errors import LawError
from ..laws import LAWS, Law, get_law, law_from_dict, law_to_dict

_RANKS = (1, 4, 64)
_INITS: tuple[Literal["A", "B"], ...] = ("A", "B")
_ALPHAS = (16.0, 2.0)

Answers = Mapping[tuple[Factor, Reference], float]


@dataclass(frozen=True)
class LawConformance:
    """The result of `check_law` for a law that passed.

    Args:
        law: the law.
        registered: whether its name is registered.
        pairs: number of pairs of factor and reference that were checked.
    """

    law: Law
    registered: bool
    pairs: int

    def __str__(self) -> str:
        name = f"its name {self.law.name!r} is registered"
        if not self.registered:
            name = (
                f"{self.law.name!r} is not registered, so recipes cannot store it and TOML was not"
                " checked"
            )
        return f"{self.law!r} passes for {self.pairs} pairs of factor and reference; {name}."


def check_law(
    law: str | Law,
    *,
    fan_in: float | Iterable[float] = (1.0, 4096.0),
    tolerance: float = 1e-9,
) -> LawConformance:
    """Check that a law has the properties of every law.

    The checks are, in this order:

    - It is a frozen dataclass, and all fields have defaults.
    - Its name belongs to it.
    - Every multiplier is a positive finite number, for A, B and whole weights, from LoRA and from
      full finetuning.
    - A second call returns the same, also in another order.
    - The multiplier at its own reference is 1, for A or for the whole weight.
    - Multipliers compose: a → b → c equals a → c.
    - If its name is registered, TOML can store it.
    - `bind` returns a law.

    They use ranks 1 to 64, two alphas and both inits.

    Args:
        law: the law or its name.
        fan_in: the widths to check. 1 is that of an embedding.
        tolerance: relative error of the checks for 1 and for composition. Use a larger one for a
            measured law.

    Raises:
        LawError: a property fails. The message names the first one, with the factor and the
            reference.

    >>> print(check_law("constant"))
    Constant() passes for 1300 pairs of factor and reference; its name 'constant' is registered.
    """
    law = get_law(law)
    _check_form(law)
    registered = law.name in LAWS.names()
    widths = [fan_in] if isinstance(fan_in, (int, float)) else fan_in
    references, factors = [], list[Factor]()
    for width in map(float, widths):
        full = Reference(method="full", fan_in=width)
        references.append(full)
        factors.append(full.as_factor())
        for rank, alpha, init in itertools.product(_RANKS, _ALPHAS, _INITS):
            at = Reference(rank, alpha, init=init, fan_in=width)
            references.append(at)
            factors += [at.as_factor(), replace(at.as_factor(), role="B")]
    pairs = [(factor, at) for at in references for factor in factors]
    answers = {pair: _ask(law, *pair) for pair in pairs}
    _check_same(law, answers, "deterministic", pairs)
    _check_same(law, answers, "order", pairs[::-1])
    _check_ratios(law, references, answers, tolerance)
    if registered:
        _check_toml(law, answers)
    bound: object = law.bind(torch.optim.AdamW, {})
    if not isinstance(bound, Law):
        cure = "Return a law, by default the law itself."
        raise _failed("bind", law, f"bind returns {bound!r}.", cure)
    return LawConformance(law, registered, len(answers))


def _failed(check: str, law: Law, cause: str, cure: str) -> LawError:
    return LawError(f"The check {check!r} fails for the law {law!r}: {cause}", cure)


def _check_form(law: Law) -> None:
    """Check that the law is a frozen dataclass with defaults, and that its name belongs to it."""
    kind: Any = type(law)
    # a base class's parameters do not cover new fields
    parameters: Any = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        cause = f"{kind.__name__} is not a frozen dataclass."
        raise _failed("form", law, cause, "Add @dataclass(frozen=True).")
    for f in fields(kind):
        if f.init and f.default is f.default_factory is MISSING:
            cause = f"its field {f.name!r} has no default."
            raise _failed("form", law, cause, "Give every field a default.")
    if not law.name or not isinstance(law.name, str):
        cause = f"its name is {law.name!r}."
        raise _failed("name", law, cause, "Set name: ClassVar[str] to a short word.")
    if law.name in LAWS.names():
        try:
            law_to_dict(law)
        except LawError as error:
            raise _failed("name", law, error.cause, error.cure) from error


def _ask(law: Law, factor: Factor, reference: Reference) -> float:
    where = _where(factor, reference)
    try:
        value = law.multiplier(factor, reference)
    except Exception as error:  # a third-party law may raise anything
        raise _failed(
            "positive",
            law,
            f"{where}, it raises {error!r}.",
            "Return a number for every factor.",
        ) from error
    if not is_positive(value):
        raise _failed(
            "positive",
            law,
            f"{where}, it returns {value!r}.",
            "Return a positive finite number.",
        )
    return float(value)


def _where(factor: Factor, reference: Reference) -> str:
    role = "a whole weight" if factor.role == "full" else factor.role
    return f"for {role} at {factor.name}, fan-in {factor.fan_in:g}, tuned at {_at(reference)}"


def _at(reference: Reference) -> str:
    return f"{reference}, fan-in {reference.fan_in:g}"


def _check_same(
    law: Law, answers: Answers, check: str, order: Iterable[tuple[Factor, Reference]]
) -> None:
    """Check that the law returns the same when it is called again in this order."""
    for pair in order:
        again = _ask(law, *pair)
        if again != answers[pair]:
            cause = f"{_where(*pair)}, it returns {answers[pair]!r} and then {again!r}."
            raise _failed(
                check,
                law,
                cause,
                "Use only the factor, the reference and the law's own fields.",
            )


def _check_ratios(
    law: Law, references: Sequence[Reference], answers: Answers, tolerance: float
) -> None:
    """Check that the multiplier is 1 at its own reference, and that a → b → c equals a → c."""
    for at in references:
        value = answers[at.as_factor(), at]
        if not math.isclose(value, 1.0, rel_tol=tolerance):
            cause = f"{_where(at.as_factor(), at)}, it returns {value!r}."
            cure = (
                "Divide by the law's rate at the reference: the base rate is that of the"
                " reference's A factor."
            )
            raise _failed("own reference", law, cause, cure)
    for a, b, c in itertools.product(references, repeat=3):
        via = answers[b.as_factor(), a] * answers[c.as_factor(), b]
        direct = answers[c.as_factor(), a]
        if not math.isclose(via, direct, rel_tol=tolerance):
            cause = (
                f"{_where(c.as_factor(), a)}, it returns {direct:g}, but {via:g} by way of"
                f" {_at(b)}."
            )
            cure = (
                "Write the multiplier as a rate at the factor divided by the same rate at the"
                " reference."
            )
            raise _failed("composes", law, cause, cure)


def _check_toml(law: Law, answers: Answers) -> None:
    plain = "Use only numbers, strings, booleans and laws as fields."
    try:
        read = law_from_dict(tomli.loads(tomli_w.dumps(law_to_dict(law))))
    except (
        Exception
    ) as error:  # tomli_w raises TypeError, a law's own check may raise anything
        raise _failed("toml", law, f"it raises {error!r}.", plain) from error
    if read != law:
        raise _failed("toml", law, f"it is read back as {read!r}.", plain)
    _check_same(read, answers, "toml", answers)
