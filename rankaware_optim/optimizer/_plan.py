"""The plan: the rate of every parameter by name, from a survey, a law and the user's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from .._checks import check_lr, plain_lr
from .._optimizers import optimizer_family
from .._rate import Rate
from .._types import Factor, Method, Reference, Survey, init_text
from .._warn import warn
from ..errors import OptimizerError
from ..laws import (
    DEFAULT_LAW,
    DISTANCE_NOTE,
    FORMS,
    Constant,
    Law,
    at_distance,
    bound_law,
    checked_batch_multiplier,
    checked_multiplier,
    get_law,
    innermost,
    known_family,
)
from ..recipe import OtherRates, Recipe
from ._recipe_use import RecipeUse, Run, use_recipe


@dataclass(frozen=True)
class PlanOptions:
    """Arguments of `RankAwareOptimizer` about rates, except the base rate. They are checked once."""

    law: str | Law = DEFAULT_LAW
    tuned_at: Reference | None = None
    rates: Mapping[str, float | Rate] = field(default_factory=dict)
    other_lr: float | Rate | None = None
    per_layer_width: bool = False
    batch: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for pattern, rate in self.rates.items():
            check_lr(rate, f"rates[{pattern!r}]")
        if self.other_lr is not None:
            check_lr(self.other_lr, "other_lr")
        batch = 1 if self.batch is None else self.batch
        if isinstance(batch, bool) or not isinstance(batch, (int, float)) or not 0 < batch < 2**63:
            raise OptimizerError(f"batch is {batch!r}.", "Give a positive number, or leave it out.")

    def rate_of(self, name: str) -> float | None:
        """Return the rate of the first pattern that matches `name`, or None."""
        return plain_lr(
            next((rate for pattern, rate in self.rates.items() if fnmatchcase(name, pattern)), None)
        )  # type: ignore[no-any-return]


class Assignment(NamedTuple):
    """The decision for one parameter. Parameters with equal assignments share a group.

    `multiplier` multiplies the base rate. `rate`, if given, replaces the product.
    """

    role: str = "other"
    rank: int | None = None
    scaling: float = 1.0
    init: str | None = None
    multiplier: float = 1.0
    rate: float | None = None


@dataclass(frozen=True)
class Plan:
    """The options resolved for one model and optimizer. It maps a factor or a name to an
    `Assignment`.

    law: bound to the optimizer. reference: with its `fan_in`. width: the model's. batch_multiplier:
    factor of every rate, those of other parameters included, if the batch differs from the
    reference's. steps_multiplier: the same for a recipe's steps. recipe: the source of the base
    rate, or None. others: its rates of other parameters. family: the optimizer's.
    """

    options: PlanOptions
    law: Law
    reference: Reference
    method: Method
    width: float
    batch_multiplier: float = 1.0
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = field(default=None, repr=False, compare=False)
    family: str = "sign-like"
    steps_multiplier: float = 1.0
    others: OtherRates | None = None

    @property
    def run_multiplier(self) -> float:
        """The factor of every rate for the run's batch and steps."""
        return self.batch_multiplier * self.steps_multiplier

    def assign(
        self, name: str, factor: Factor | None, *, own_lr: bool = False, trains: bool = True
    ) -> Assignment:
        """Return the assignment of a parameter.

        Args:
            name: the parameter's name.
            factor: the LoRA factor or whole weight that it is, None for other parameters.
            own_lr: whether the user's group has an explicit rate. For other parameters it takes
                precedence over a recipe.
            trains: whether the parameter trains. One that does not needs no rate.
        """
        pinned = self.options.rate_of(name)
        if factor is None:
            rate = plain_lr(self.options.other_lr) if pinned is None else pinned
            if rate is None and self.others is not None and self.method == "lora" and not own_lr:
                known = self.others.rate(name, trains)
                rate = None if known is None else known * self.run_multiplier
            whole = Factor("other parameters", "full", None, self.width, self.width)
            moved = self.used_multiplier(whole) if self.method == "full" else 1.0
            return Assignment(
                multiplier=1.0 if rate is not None else moved * self.run_multiplier, rate=rate
            )
        moved = 1.0 if pinned is not None else self.used_multiplier(factor) * self.run_multiplier
        return Assignment(factor.role, factor.rank, factor.scaling, factor.init, moved, pinned)

    def has_own_rate(self, group: Mapping[str, Any]) -> bool:
        """Return whether a built group has an explicit rate, by `rates` or `other_lr`."""
        return self.is_named(group) or (
            group.get("lora_role") == "other" and self.options.other_lr is not None
        )

    def reason_of_other(self, names: Sequence[str], multiplier: float) -> str:
        """Return in words where the rate of parameters that are not factors comes from."""
        if (
            self.others is None
            or not names
            or (multiplier == self.run_multiplier and not self.others.knows(names[0]))
        ):
            return "the base rate"
        return self.others.reason(names[0])

    def is_named(self, group: Mapping[str, Any]) -> bool:
        """Return whether a pattern of `rates` matches a built group's parameters."""
        return any(
            self.options.rate_of(name) is not None for name in group.get("param_names", ())[:1]
        )

    def used_multiplier(self, factor: Factor) -> float:
        """Return the multiplier with which `factor` trains at the reference's batch: the law's, at
        its distance.
        """
        return at_distance(self.law, self.multiplier(factor))

    def multiplier(self, factor: Factor) -> float:
        """Return the law's multiplier for `factor`, at the model's width and within the law of the
        factor's init.

        Pairs in which neither factor starts at zero keep the base rate. An embedding's input is
        one-hot, so its width is 1, and its rate moves only within its init. It does not move from a
        full-finetuning rate, which has no init.
        """
        reference, own_width = self.reference, self.options.per_layer_width
        if factor.role == "full":
            seen = factor if own_width else replace(factor, fan_in=self.width)
            return checked_multiplier(self.law, seen, reference)
        embedding = factor.kind == "embedding"
        if factor.init == "other" or (embedding and reference.method == "full"):
            return 1.0
        init: Literal["A", "B"] = "B" if factor.init == "B" else "A"
        width = 1.0 if embedding else factor.fan_in if own_width else self.width
        if embedding:
            reference = replace(reference, init=init, fan_in=1.0)
        elif reference.method == "lora":
            reference = replace(reference, init=init)
        return checked_multiplier(self.law, replace(factor, fan_in=width, init=init), reference)


def make_plan(
    survey: Survey,
    options: PlanOptions,
    optimizer_class: type | None = None,
    settings: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    run: Run | None = None,
) -> Plan:
    """Bind the law, resolve the reference and match the user's patterns. Nothing is built yet."""
    names = [*(f.name for f in survey.factors), *survey.other]
    for pattern in options.rates:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptimizerError(
                f"The pattern {pattern!r} of rates= matches none of {len(names)} trainable"
                " parameters.",
                f"Give an fnmatch pattern of full names, such as {names[-1]!r}.",
            )
    method: Method = "full" if any(f.role == "full" for f in survey.factors) else "lora"
    moved = replace(
        survey, factors=tuple(f for f in survey.factors if options.rate_of(f.name) is None)
    )
    fallback = (
        survey.dominant() if survey.factors else Reference(method="full")
    )  # without pairs no rate is moved
    reference = (options.tuned_at or fallback).resolve(moved)
    law = get_law(options.law)
    use: RecipeUse | None = None
    family = "sign-like" if optimizer_class is None else optimizer_family(optimizer_class, settings)
    if optimizer_class is not None:
        if options.strict:
            known_family(optimizer_class, settings)
        law = bound_law(law, optimizer_class, settings or {})
        if recipe is not None and run is not None:
            use = use_recipe(recipe, survey, run)
    width = moved.full_width(reference.init) if method == "full" else moved.width
    by_batch = 1.0
    if options.batch is not None and reference.batch is not None:
        by_batch = checked_batch_multiplier(law, options.batch / reference.batch)
    plan = Plan(options, law, reference, method, width, by_batch, recipe=recipe, family=family)
    own_notes = _notes(plan, survey, optimizer_class, settings)
    if use is None:
        return replace(plan, notes=(*survey.notes, *own_notes))
    notes = (*survey.notes, *use.notes, *own_notes)
    return replace(plan, notes=notes, steps_multiplier=use.by_steps, others=use.others)


def _notes(
    plan: Plan, survey: Survey, optimizer_class: type | None, settings: Mapping[str, Any] | None
) -> list[str]:
    """Return the report's notes on the plan: what no law covers, what is uncertain, and what was
    assumed.
    """
    law, reference, options = plan.law, plan.reference, plan.options
    notes = []
    inits = {f.init for f in survey.factors if f.role != "full"}
    if "other" in inits:
        notes.append(
            "Adapters with neither factor zero (PiSSA, OLoRA, LoRA-GA, or trained ones of"
            " undeclared init) keep the base rate, since no law covers them: give init='A' (B = 0"
            " at the start) or 'B' (A = 0) if you know it."
        )
        warn(notes[-1])
    if options.tuned_at is None and len({(f.rank, f.scaling, f.init) for f in survey.factors}) > 1:
        notes.append(
            f"tuned_at not given: lr counts as tuned at {reference}, the most common of this model."
        )
    if "unknown" in inits:
        notes.append(
            "The init of some adapters could not be read. It is assumed that they started at B = 0."
        )
    others = {f.init for f in survey.factors if f.kind != "embedding"} & {"A", "B"} - {
        reference.init
    }
    crossing = bool(others) and plan.method == reference.method == "lora"
    if crossing:
        notes.append(
            f"Adapters at {init_text(others.pop())} are scaled within their own init, though the"
            f" rate was tuned at {init_text(reference.init)}: tune or calibrate there."
        )
    if _keeps_distance(plan, survey):
        notes.append(DISTANCE_NOTE)
    if plan.method == "full" and reference.method == "lora" and law.name != "power":
        notes.append(_full_note(plan))
    if optimizer_class is not None and get_law(options.law).name != "constant":
        notes += _family_notes(plan, optimizer_class.__name__)
    if options.batch is not None and reference.batch is None:
        notes.append(
            "The reference has no batch, so batch= moves no rate: give tuned_at=Reference(...,"
            " batch=...)."
        )
    elif plan.batch_multiplier != 1.0:
        change = f"From batch {reference.batch:g} to {options.batch:g}"
        notes.append(
            f"{change} every rate is multiplied by {plan.batch_multiplier:.3g}, a rule of thumb."
        )
    elif options.batch != reference.batch and options.batch is not None:
        notes.append(f"The law {law.name!r} does not move rates with the batch.")
    return notes


def _keeps_distance(plan: Plan, survey: Survey) -> bool:
    """Return whether a factor's rate keeps the distance of a rate that the default law moves."""
    free = (f for f in survey.factors if plan.options.rate_of(f.name) is None)
    of_each_kind = {(f.role, f.kind, f.rank, f.scaling, f.init, f.fan_in): f for f in free}
    return any(plan.used_multiplier(f) != plan.multiplier(f) for f in of_each_kind.values())


def _full_note(plan: Plan) -> str:
    """Return a note on the uncertainty of a LoRA rate that is moved to full finetuning without a
    calibration.
    """
    if plan.law.name == "constant":
        return (
            "No law moves this LoRA rate to full finetuning, whose best rate may be octaves away:"
            " calibrate with full runs."
        )
    known = plan.family in ("sign-like", "unknown")
    worth = (
        "is good to an octave or two" if known else f"was never tried with {plan.family} optimizers"
    )
    return (
        f"From a LoRA rate alone the law's rate for full finetuning {worth}, and too high costs"
        " more than too low: start at half of it, or settle it by three full runs (calibrate with"
        " full_trials=3)."
    )


def _family_notes(plan: Plan, optimizer: str) -> list[str]:
    """Return a note on an optimizer that is not sign-like: which law moves its rates, and why."""
    law, family = plan.law, plan.family
    if family == "sign-like":
        return []
    if family == "unknown":
        words = "is of an unknown family and is scaled as a sign-like optimizer, such as Adam"
    elif family not in FORMS and isinstance(law, Constant):
        words = (
            f"is {family}: no form of µA is known to hold for that family, so all ranks have one"
            " rate"
        )
    elif getattr(innermost(law), "family", None) != family:
        words = f"is {family}, for which the law {law.name!r} has no form"
    elif FORMS[family].one_rank:
        words = (
            f"is {family}: in small runs its best rate followed µA's form with alpha but not with"
            " rank, so its rates do the same"
        )
    else:
        words = (
            f"is {family}: µA's form for that family moves its rates, derived for square layers; in"
            " small runs it lost less than one rate"
        )
    return [f"{optimizer} {words}."]
