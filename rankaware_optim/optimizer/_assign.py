"""What every parameter is, and the rate that it gets: `Assigner.assign` decides both, and why.

    lr = the group's base rate × multiplier
    multiplier = the law's number from the reference to the factor × that for the run's batch, steps

A parameter that is no factor has the law's number 1. A rate that was given outright, or that a
recipe has for such a parameter, replaces the product. This module knows no groups, and no optimizer
that is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from .._optimizers import optimizer_family
from .._types import Factor, Method, Reference, width_for
from .._warn import warn
from ..inspection import (
    LAWLESS,
    Survey,
    dense,
    is_other_adapter,
    other_kind,
    reason_of_other,
    reason_without_law,
    unread_lora,
)
from ..laws import (
    FORMS,
    ONE_RATE,
    Law,
    beyond_batches,
    checked_batch_multiplier,
    checked_multiplier,
)
from ._source import Settings, Source


@dataclass(frozen=True)
class Assigned:
    """What a parameter is, and its rate: its group's base rate × `multiplier`, or `given`.

    Args:
        role: "A" or "B" for LoRA's factors, "full" for whole weights, "other", or "frozen" in a
            report.
        rank: the LoRA rank, None for what is no factor.
        scaling: s, the factor of B·A, None for what is no factor.
        init: "A" if B started at zero, "B" if A did, else "other" or "unknown".
        family: the optimizer's kind of update there.
        multiplier: what multiplies the base rate.
        given: a rate that was given outright, by `rates`, `other_lr` or a recipe.
        why: the reason for the rate in words.
    """

    role: str = "other"
    rank: int | None = None
    scaling: float | None = None
    init: str | None = None
    family: str = "sign-like"
    multiplier: float = 1.0
    given: float | None = None
    why: str = reason_of_other(None)


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

    source: of the base rate. method: how the model trains. moves: by the numbers of several models,
    and that of all under "". optimizer, settings: the class, and what it was given for all groups.
    """

    source: Source
    method: Method
    moves: Mapping[str, Move]
    optimizer: type | None = None
    settings: Settings = field(default_factory=dict)

    @property
    def reference(self) -> Reference:
        """Where the base rate was tuned, or counts as tuned."""
        return self.moves[""].reference

    def rule(self, settings: Settings) -> Rule:
        """Return the rule of a group, whose settings may put it into another family."""
        if self.optimizer is None:
            return Rule(self.source.law, "sign-like")
        law = self.source.law.bind(self.optimizer, settings)
        return Rule(law, optimizer_family(self.optimizer, settings))

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
        what = Assigned(family=rule.family)
        if factor is not None:
            what = replace(what, role=factor.role, rank=factor.rank)
        if factor is not None and factor.role != "full":
            what = replace(what, scaling=factor.scaling, init=factor.init)
        given = self.source.rate_of(name, other=factor is None)
        if given is not None:
            return replace(what, given=given.lr, why=given.reason)
        if factor is None and self.method == "full":
            width = self.moves[""].width
            factor = Factor("other parameters", "full", None, width, width)
        if factor is not None:
            by_law = self.multiplier(factor, rule.law)
            why = self._why(factor, rule, by_law)
            return replace(what, multiplier=by_run * by_law, why=why)
        rated = None
        kind = other_kind(name)
        if not own_lr:
            rated = self.source.rate_of_other(name, trains)
        if rated is not None:
            why = reason_of_other(kind, rated.reason)
            return replace(what, given=rated.lr * by_run, why=why)
        words = "the base rate (other_lr= or rates= sets another)"
        return replace(what, multiplier=by_run, why=reason_of_other(kind, words))

    def _why(self, factor: Factor, rule: Rule, by_law: float) -> str:
        """Return why a rate that the law moves is what it is."""
        if factor.init == "other":
            return reason_without_law(factor)
        if self.source.reference is None and by_law == 1.0:
            return "tuned_at not given: nothing is moved"
        words = self.source.title.removeprefix("law ")
        if self.source.recipe is not None:
            words = "recipe"
        family = "" if rule.family == "sign-like" else f", {rule.family}"
        to_full = "full finetuning, " if factor.role == "full" else ""
        return f"{words}{family}: {to_full}from {self.reference}"

    def note_of(self, family: str) -> str:
        """Return what is said of a family, "" of the sign-like, or where all have one rate."""
        law = self.source.law
        if self.optimizer is None or family == "sign-like" or law.name == "constant":
            return ""
        words = FORMS[family].words if family in FORMS else ONE_RATE[family]
        if family != "unknown" and not hasattr(law, "family"):
            words = f"{family}, for which the law {law.name!r} has no form"
        return f"{self.optimizer.__name__} is {words}."

    def multiplier(self, factor: Factor, law: Law) -> float:
        """Return the law's multiplier for `factor`, at the model's width and within the law of the
        factor's init.

        Pairs in which neither factor starts at zero keep the base rate. An embedding's input is
        one-hot, so its width is 1, and its rate moves only within its init. It does not move from a
        full-finetuning rate, which has no init.
        """
        embedding = factor.kind == "embedding"
        reference, width = self.moves.get(_model_number(factor), self.moves[""])
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
    source: Source,
    method: Method,
    optimizer: type | None = None,
    settings: Settings | None = None,
    *,
    are_several: bool = False,
) -> Assigner:
    """Resolve the reference on a model, and match the user's patterns.

    are_several: whether the survey is of several models, whose numbers begin its names.
    """
    source.check_given([*(f.name for f in survey.factors), *survey.other])
    reference = source.reference
    if reference is None:  # without pairs no rate is moved
        reference = survey.dominant() if survey.factors else Reference(method="full")
    by_model: dict[str, list[Factor]] = {"": []}
    for factor in survey.factors:
        # a factor with a rate of its own does not count for the width
        if source.rate_of(factor.name) is None:
            by_model[""].append(factor)
            if are_several:
                by_model.setdefault(_model_number(factor), []).append(factor)
    moves = {}
    for number, factors in by_model.items():
        of_model = Survey(tuple(factors))
        width = width_for(of_model, method, reference.init)
        moves[number] = Move(reference.resolve(of_model), width)
    return Assigner(source, method, moves, optimizer, settings or {})


# --- what a report says of the rates --------------------------------------------------------------

_NO_ZERO = (
    "pairs with neither factor zero at the start (PiSSA, OLoRA, LoRA-GA, or trained ones of"
    " undeclared init: init='A' says that B of a pair started at zero, init='B' that A did)"
)
_UNREAD = (
    "LoRA in no pair that inspection can read (register_convention() adds a layout)"
)


def notes_of(assigner: Assigner, survey: Survey) -> tuple[str, ...]:
    """Return what a report says of the rates. Warn of adapters that no law moves."""
    notes = [*assigner.source.notes, *survey.notes]
    kinds = _kinds_without_a_law(assigner, survey)
    if kinds:
        words = " and ".join(sorted(set(kinds.values())))
        notes.append(
            f"No law covers {words}: {len(kinds)} parameters, such as {next(iter(kinds))}, train at"
            " the base rate, whatever tuned_at= says. rates= gives them another."
        )
        warn(notes[-1])
    notes += _of_adapters(assigner, survey)
    notes += _of_full_finetuning(assigner)
    notes += _of_batch(assigner)
    return tuple(notes)


def _kinds_without_a_law(assigner: Assigner, survey: Survey) -> dict[str, str]:
    """Return the kinds of adapters that no law covers, by their parameters. Those of no A and B are
    of interest where a rate is moved from a reference.
    """
    kinds = dict[str, str]()
    rate_of = assigner.source.rate_of
    for factor in survey.factors:
        if factor.init == "other" and rate_of(factor.name) is None:
            kinds[factor.name] = LAWLESS.get(factor.kind, _NO_ZERO)
    others = dict.fromkeys(unread_lora(survey), _UNREAD)
    if assigner.source.reference is not None:
        others |= {n: k for n, k in survey.unsupported.items() if is_other_adapter(n)}
    for name, kind in others.items() if assigner.method == "lora" else ():
        if rate_of(name, other=True) is None:
            kinds[name] = kind
    return kinds


def _of_adapters(assigner: Assigner, survey: Survey) -> Iterator[str]:
    """Yield what is assumed of the adapters' ranks and inits."""
    tuned = assigner.reference
    kinds = {(f.rank, f.scaling, f.init) for f in survey.factors}
    if assigner.source.reference is None and len(kinds) > 1:
        yield (
            f"tuned_at not given: lr counts as tuned at {tuned}, the most common of this model."
        )
    if any(f.init == "unknown" for f in survey.factors):
        yield (
            "The init of some adapters could not be read. It is assumed that they started at B ="
            " 0."
        )
    another = "B" if tuned.init == "A" else "A"
    is_lora = assigner.method == tuned.method == "lora"
    if is_lora and any(f.init == another for f in dense(survey.factors)):
        yield (
            f"Adapters at init {another} are scaled within their own init, though the rate"
            f" was tuned at init {tuned.init}: tune or calibrate there."
        )


def _of_full_finetuning(assigner: Assigner) -> Iterator[str]:
    """Yield what is uncertain of a rate that is moved from LoRA to full finetuning."""
    if assigner.method != "full" or assigner.reference.method != "lora":
        return
    law = assigner.rule(assigner.settings).law
    if law.name == "constant":
        yield (
            "No law moves this LoRA rate to full finetuning, whose best rate may be several times"
            " as high or as low: calibrate with full runs."
        )
    elif law.name != "power":
        yield (
            "From a LoRA rate alone the law's rate for full finetuning is good to a factor of 2 to"
            " 4 with Adam, and was not tried with optimizers of another family. Too high costs more"
            " than too low: start at half of it, or settle it by three full runs (calibrate with"
            " full_trials=3)."
        )


def _of_batch(assigner: Assigner) -> Iterator[str]:
    """Yield what the run's batch does to the rates."""
    batch = assigner.source.batch
    tuned = assigner.reference.batch
    if batch is None or batch == tuned:
        return
    if tuned is None:
        yield (
            "The reference has no batch, so batch= moves no rate: give it in tuned_at=, as in"
            " 'r=16,alpha=32,batch=16'."
        )
        return
    law = assigner.rule(assigner.settings).law
    ratio = batch / tuned
    by_batch = checked_batch_multiplier(law, ratio)
    yield (
        f"From batch {tuned:g} to {batch:g} every rate is multiplied by"
        f" {by_batch:.3g}{beyond_batches(ratio)}: a rule of thumb."
    )
