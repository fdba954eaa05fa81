"""What every parameter is, and the rate that it gets: `Assigner.assign` decides both, and why.

It knows neither groups nor an optimizer that is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, NamedTuple

from .._checks import check_lr, plain_lr
from .._optimizers import Known, goes_to_adam, known_optimizer, optimizer_family
from .._rate import Rate
from .._types import (
    Factor,
    Method,
    Rated,
    Reference,
    Survey,
    reason_of_other,
    reason_without_law,
    width_for,
)
from ..errors import OptimizerError
from ..inspection import other_kind
from ..laws import Law, bound_law, checked_multiplier
from ._source import Tuned

Settings = Mapping[str, Any]


class Assigned(NamedTuple):
    """What a parameter is, and its rate: its group's base rate × `multiplier`, or `lr` if given.

    family: the optimizer's kind of update there. why: the reason for the rate in words.
    """

    role: str = "other"
    rank: int | None = None
    scaling: float | None = None
    init: str | None = None
    family: str = "sign-like"
    multiplier: float = 1.0
    lr: float | None = None
    why: str = reason_of_other(None)


@dataclass(frozen=True)
class Explicit:
    """Rates that the user gave outright: by name pattern, and of what is no factor."""

    rates: Mapping[str, float | Rate] = field(default_factory=dict)
    other_lr: float | Rate | None = None

    def __post_init__(self) -> None:
        for pattern, rate in self.rates.items():
            check_lr(rate, f"rates[{pattern!r}]")
        if self.other_lr is not None:
            check_lr(self.other_lr, "other_lr")

    def check_patterns(self, names: Sequence[str]) -> None:
        """Raise if a pattern of `rates` matches none of the trainable parameters."""
        for pattern in self.rates:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptimizerError(
                    f"The pattern {pattern!r} of rates= matches none of {len(names)} trainable"
                    " parameters.",
                    f"Give an fnmatch pattern of full names, such as {names[-1]!r}.",
                )

    def rate_of(self, name: str, other: bool = False) -> Rated | None:
        """Return the rate of the first pattern that matches `name`, else `other_lr` if it is no
        factor (`other`), or None.
        """
        for pattern, rate in self.rates.items():
            if fnmatchcase(name, pattern):
                return Rated(float(rate), "given by rates=")
        if other and self.other_lr is not None:
            return Rated(plain_lr(self.other_lr), "given by other_lr=")
        return None


class Move(NamedTuple):
    """From where to where a law moves a model's rates: a reference with its fan-in, and the model's
    width, see `width_for`.
    """

    reference: Reference
    width: float


class Rule(NamedTuple):
    """How one family of optimizers moves rates: a law that is bound to it."""

    law: Law
    family: str


@dataclass(frozen=True)
class Assigner:
    """Assigns rates to the parameters of a model.

    source: of the base rate. method: how the model trains. move: that of the model, `moves` those
    of several models by their numbers. optimizer, settings: the class, and what it was given for
    all groups.
    """

    source: Tuned
    explicit: Explicit
    method: Method
    move: Move
    moves: Mapping[str, Move] = field(default_factory=dict)
    optimizer: type | None = None
    settings: Settings = field(default_factory=dict)

    @cached_property
    def known(self) -> Known:
        """The optimizer's known properties."""
        return Known() if self.optimizer is None else known_optimizer(self.optimizer)[1]

    def goes_to_adam(self, settings: Settings, shape: Sequence[int]) -> bool:
        """Return whether the optimizer hands a parameter of a group with these settings to its
        Adam.
        """
        return goes_to_adam(self.known, {**self.settings, **settings}, shape)

    def rule(self, settings: Settings, to_adam: bool = False) -> Rule:
        """Return the rule of a group, whose settings may put it into another family.

        to_adam: whether it is for what a spectral optimizer hands to its Adam.
        """
        if self.optimizer is None:
            return Rule(self.source.law, "sign-like")
        given = {**self.settings, **settings}
        if to_adam:
            given["use_muon"] = False
        family = optimizer_family(self.optimizer, given)
        return Rule(bound_law(self.source.law, self.optimizer, given), family)

    def assign(
        self,
        name: str,
        factor: Factor | None,
        rule: Rule,
        *,
        own_lr: bool = False,
        trains: bool = True,
    ) -> Assigned:
        """Return what a parameter is, and its rate.

        Args:
            name: the parameter's name.
            factor: the LoRA factor or whole weight that it is, None for other parameters.
            rule: that of its group.
            own_lr: whether the user's group has an explicit rate. For other parameters it takes
                precedence over a recipe.
            trains: whether the parameter trains. One that does not needs no rate.
        """
        by_run = self.source.by_run(rule.law)
        assigned = Assigned(family=rule.family, multiplier=by_run)
        if factor is not None:
            assigned = assigned._replace(role=factor.role, rank=factor.rank)
        if factor is not None and factor.role != "full":
            assigned = assigned._replace(scaling=factor.scaling, init=factor.init)
        rated = self.explicit.rate_of(name, other=factor is None)
        if rated is not None:
            return assigned._replace(multiplier=1.0, lr=rated.lr, why=rated.reason)
        if factor is None and self.method == "full":
            width = self.move.width
            factor = Factor("other parameters", "full", None, width, width)
        if factor is not None:
            by_law = self.multiplier(factor, rule.law)
            why = self._why(factor, rule, by_law)
            return assigned._replace(multiplier=by_run * by_law, why=why)
        rated = None if own_lr else self.source.other(name, trains)
        if rated is None:
            whence = "the base rate (other_lr= or rates= sets another)"
        else:
            assigned = assigned._replace(multiplier=1.0, lr=rated.lr * by_run)
            whence = rated.reason
        return assigned._replace(why=reason_of_other(other_kind(name), whence))

    def _why(self, factor: Factor, rule: Rule, by_law: float) -> str:
        """Return why a rate that the law moves is what it is."""
        if factor.init == "other":
            return reason_without_law(factor)
        if self.source.reference is None and by_law == 1.0:
            return "tuned_at not given: nothing is moved"
        family = "" if rule.family == "sign-like" else f", {rule.family}"
        to_full = "full finetuning, " if factor.role == "full" else ""
        return f"{self.source.words}{family}: {to_full}from {self.move.reference}"

    def multiplier(self, factor: Factor, law: Law) -> float:
        """Return the law's multiplier for `factor`, at the model's width and within the law of the
        factor's init.

        Pairs in which neither factor starts at zero keep the base rate. An embedding's input is
        one-hot, so its width is 1, and its rate moves only within its init. It does not move from a
        full-finetuning rate, which has no init.
        """
        embedding = factor.kind == "embedding"
        reference, width = self.moves.get(_model_number(factor), self.move)
        if factor.role == "full":
            return checked_multiplier(law, replace(factor, fan_in=width), reference)
        if factor.init == "other" or (embedding and reference.method == "full"):
            return 1.0
        init: Literal["A", "B"] = "B" if factor.init == "B" else "A"
        if embedding:
            width = 1.0
            reference = replace(reference, init=init, fan_in=1.0)
        elif reference.method == "lora":
            reference = replace(reference, init=init)
        here = replace(factor, fan_in=width, init=init)
        return checked_multiplier(law, here, reference)


def _model_number(factor: Factor) -> str:
    return factor.name.partition(".")[0]


def make_assigner(
    survey: Survey,
    source: Tuned,
    explicit: Explicit | None = None,
    optimizer: type | None = None,
    settings: Settings | None = None,
    *,
    are_several: bool = False,
) -> Assigner:
    """Resolve the reference on a model, and match the user's patterns.

    are_several: whether the survey is of several models, whose numbers begin its names.
    """
    explicit = explicit or Explicit()
    explicit.check_patterns([*(f.name for f in survey.factors), *survey.other])
    moved = [f for f in survey.factors if explicit.rate_of(f.name) is None]
    is_full = any(f.role == "full" for f in survey.factors)
    method: Method = "full" if is_full else "lora"
    reference = source.reference
    if reference is None:  # without pairs no rate is moved
        reference = survey.dominant() if survey.factors else Reference(method="full")
    moves = {}
    for number in map(_model_number, moved) if are_several else ():
        of_model = [f for f in moved if _model_number(f) == number]
        moves[number] = _move(of_model, method, reference)
    move = _move(moved, method, reference)
    return Assigner(
        source, explicit, method, move, moves, optimizer, dict(settings or {})
    )


def _move(factors: Sequence[Factor], method: Method, reference: Reference) -> Move:
    survey = Survey(tuple(factors))
    width = width_for(survey, method, reference.init)
    return Move(reference.resolve(survey), width)
