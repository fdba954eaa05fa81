"""The plan: the rate of every parameter by name, from a survey, a law and the user's options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from .._checks import check_lr, is_number, plain_lr
from .._optimizers import RANK_AWARE, optimizer_family
from .._rate import Rate
from .._types import Factor, Method, Reference, Survey, dense, init_text, width_for
from .._warn import warn
from ..errors import OptimizerError
from ..laws import (
    DEFAULT_LAW,
    DISTANCE_NOTE,
    FORMS,
    SIGN_LIKE,
    Constant,
    Law,
    at_distance,
    bound_law,
    checked_batch_multiplier,
    checked_multiplier,
    get_law,
    innermost,
)
from ..recipe import OtherRates, Recipe

Settings = Mapping[str, Any]
_NO_ZERO = (
    "Adapters with neither factor zero (PiSSA, OLoRA, LoRA-GA, or trained ones of undeclared init)"
    " keep the base rate, since no law covers them: give init='A' (B = 0 at the start) or 'B' (A ="
    " 0) if you know it."
)


@dataclass(frozen=True)
class PlanOptions:
    """Arguments of `RankAwareOptimizer` about rates, except the base rate, checked once."""

    law: str | Law = DEFAULT_LAW
    tuned_at: Reference | None = None
    rates: Mapping[str, float | Rate] = field(default_factory=dict)
    other_lr: float | Rate | None = None
    batch: float | None = None

    def __post_init__(self) -> None:
        for pattern, rate in self.rates.items():
            check_lr(rate, f"rates[{pattern!r}]")
        if self.other_lr is not None:
            check_lr(self.other_lr, "other_lr")
        if self.batch is not None and not (
            is_number(self.batch) and 0 < self.batch < 2**63
        ):
            raise OptimizerError(
                f"batch is {self.batch!r}.", "Give a positive number, or leave it out."
            )

    def rate_of(self, name: str) -> float | None:
        """Return the rate of the first pattern that matches `name`, or None."""
        for pattern, rate in self.rates.items():
            if fnmatchcase(name, pattern):
                return float(rate)
        return None


class Assignment(NamedTuple):
    """The decision for one parameter, as tags of its group. Parameters with equal ones share a
    group.

    `rank_multiplier` multiplies the base rate. `pinned_lr`, if given, replaces the product.
    """

    rank_multiplier: float = 1.0
    pinned_lr: float | None = None
    lora_role: str = "other"
    lora_rank: int | None = None
    lora_scale: float = 1.0
    lora_init: str | None = None
    rank_family: str = "sign-like"


class RecipeUse(NamedTuple):
    """A recipe in a run: notes, the factor of every rate for the run's steps, and the rates of
    other parameters.
    """

    recipe: Recipe
    notes: tuple[str, ...]
    by_steps: float
    others: OtherRates


@dataclass(frozen=True)
class Plan:
    """The options resolved for one model and optimizer. It maps a factor or a name to an
    `Assignment`.

    survey: of the model before training, since a trained pair does not show its init. law: bound to
    the optimizer. reference: with its `fan_in`. width: the model's. family: the optimizer's. use:
    the recipe of the base rate, or None. batch_multiplier: factor of every rate, those of other
    parameters included, if the batch differs from the reference's. optimizer, settings: the class,
    and what it was given for all groups.
    """

    options: PlanOptions
    survey: Survey = field(repr=False)
    law: Law
    reference: Reference
    method: Method
    width: float
    family: str = "sign-like"
    use: RecipeUse | None = field(default=None, repr=False, compare=False)
    batch_multiplier: float = 1.0
    notes: tuple[str, ...] = ()
    optimizer: type | None = field(default=None, repr=False)
    settings: Settings = field(default_factory=dict, repr=False)

    def for_group(self, settings: Settings, to_adam: bool = False) -> Plan:
        """Return the plan for a parameter group, whose settings may put it into another family.

        Args:
            settings: the group's own settings.
            to_adam: whether it holds what a spectral optimizer hands to its Adam.
        """
        if self.optimizer is None:
            return self
        in_force = {**self.settings, **settings}
        if to_adam:
            in_force["use_muon"] = False
        law, family = _bound(self.options, self.optimizer, in_force)
        by_batch = _by_batch(self.options, self.reference, law)
        return replace(self, law=law, family=family, batch_multiplier=by_batch)

    @property
    def run_multiplier(self) -> float:
        """The factor of every rate for the run's batch and steps."""
        return self.batch_multiplier * (1.0 if self.use is None else self.use.by_steps)

    def assign(
        self,
        name: str,
        factor: Factor | None,
        *,
        own_lr: bool = False,
        trains: bool = True,
    ) -> Assignment:
        """Return the assignment of a parameter.

        Args:
            name: the parameter's name.
            factor: the LoRA factor or whole weight that it is, None for other parameters.
            own_lr: whether the user's group has an explicit rate. For other parameters it takes
                precedence over a recipe.
            trains: whether the parameter trains. One that does not needs no rate.
        """
        pinned, moved = self.options.rate_of(name), self.run_multiplier
        if factor is not None:
            moved = 1.0 if pinned is not None else moved * self.used_multiplier(factor)
            return Assignment(
                moved,
                pinned,
                factor.role,
                factor.rank,
                factor.scaling,
                factor.init,
                self.family,
            )
        if pinned is None:
            pinned = plain_lr(self.options.other_lr)
        if pinned is None and self.method == "full":
            whole = Factor("other parameters", "full", None, self.width, self.width)
            moved *= self.used_multiplier(whole)
            return Assignment(moved, rank_family=self.family)
        if pinned is None and self.use is not None and not own_lr:
            rate = self.use.others.rate(name, trains)
            pinned = None if rate is None else rate * moved
        if pinned is not None:
            moved = 1.0
        return Assignment(moved, pinned, rank_family=self.family)

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
        reference, embedding = self.reference, factor.kind == "embedding"
        width = self.width
        if factor.role == "full":
            return checked_multiplier(
                self.law, replace(factor, fan_in=width), reference
            )
        if factor.init == "other" or (embedding and reference.method == "full"):
            return 1.0
        init: Literal["A", "B"] = "B" if factor.init == "B" else "A"
        if embedding:
            width, reference = 1.0, replace(reference, init=init, fan_in=1.0)
        elif reference.method == "lora":
            reference = replace(reference, init=init)
        return checked_multiplier(
            self.law, replace(factor, fan_in=width, init=init), reference
        )


def make_plan(
    survey: Survey,
    options: PlanOptions,
    optimizer_class: type | None = None,
    settings: Settings | None = None,
    use: RecipeUse | None = None,
    groups: Sequence[Settings] = ({},),
) -> Plan:
    """Bind the law, resolve the reference and match the user's patterns. Nothing is built yet.

    groups: the settings of each of the user's groups, of whose families the notes speak.
    """
    _check_patterns(options, survey)
    roles = {f.role for f in survey.factors}
    method: Method = "full" if "full" in roles else "lora"
    factors = (f for f in survey.factors if options.rate_of(f.name) is None)
    moved = replace(survey, factors=tuple(factors))
    reference = options.tuned_at
    if reference is None:  # without pairs no rate is moved
        reference = survey.dominant() if survey.factors else Reference(method="full")
    reference = reference.resolve(moved)
    law, family, settings = get_law(options.law), "sign-like", settings or {}
    if optimizer_class is not None:
        law, family = _bound(options, optimizer_class, settings)
    width = width_for(moved, method, reference.init)
    by_batch = _by_batch(options, reference, law)
    plan = Plan(
        options,
        survey,
        law,
        reference,
        method,
        width,
        family,
        use,
        by_batch,
        optimizer=optimizer_class,
        settings=settings,
    )
    notes = list(_notes(plan, moved))
    for each in {p.family: p for p in map(plan.for_group, groups)}.values():
        notes += _family_notes(each)
    return replace(plan, notes=(*notes, *_batch_notes(plan)))


def _bound(
    options: PlanOptions, optimizer_class: type, settings: Settings
) -> tuple[Law, str]:
    """Return the law for a parameter group of an optimizer, and the group's family."""
    law = bound_law(get_law(options.law), optimizer_class, settings)
    return law, optimizer_family(optimizer_class, settings)


def _by_batch(options: PlanOptions, reference: Reference, law: Law) -> float:
    if options.batch is None or reference.batch is None:
        return 1.0
    return checked_batch_multiplier(law, options.batch / reference.batch)


def _check_patterns(options: PlanOptions, survey: Survey) -> None:
    names = [*(f.name for f in survey.factors), *survey.other]
    for pattern in options.rates:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptimizerError(
                f"The pattern {pattern!r} of rates= matches none of {len(names)} trainable"
                " parameters.",
                f"Give an fnmatch pattern of full names, such as {names[-1]!r}.",
            )


def _notes(plan: Plan, moved: Survey) -> Iterator[str]:
    """Yield the report's notes on the plan: what no law covers, what is uncertain, and what was
    assumed.

    moved: the survey without the factors that have a rate by name.
    """
    yield from plan.survey.notes
    if plan.use is not None:
        yield from plan.use.notes
    yield from _init_notes(plan)
    of_each_kind = {
        (f.role, f.kind, f.rank, f.scaling, f.init, f.fan_in): f for f in moved.factors
    }
    if any(
        plan.used_multiplier(f) != plan.multiplier(f) for f in of_each_kind.values()
    ):
        yield DISTANCE_NOTE
    if plan.method == "full" and plan.reference.method == "lora":
        yield from _full_notes(plan)


def _init_notes(plan: Plan) -> Iterator[str]:
    """Yield what is assumed of the adapters' ranks and inits."""
    reference, factors = plan.reference, plan.survey.factors
    inits = {f.init for f in factors}
    if "other" in inits:
        warn(_NO_ZERO)
        yield _NO_ZERO
    kinds = {(f.rank, f.scaling, f.init) for f in factors}
    if plan.options.tuned_at is None and len(kinds) > 1:
        yield (
            f"tuned_at not given: lr counts as tuned at {reference}, the most common of this model."
        )
    if "unknown" in inits:
        yield (
            "The init of some adapters could not be read. It is assumed that they started at B = 0."
        )
    other = {"A": "B", "B": "A"}[reference.init]
    of_layers = {f.init for f in dense(factors)}
    if other in of_layers and plan.method == reference.method == "lora":
        yield (
            f"Adapters at {init_text(other)} are scaled within their own init, though the"
            f" rate was tuned at {init_text(reference.init)}: tune or calibrate there."
        )


def _batch_notes(plan: Plan) -> Iterator[str]:
    """Yield what the run's batch does to the rates."""
    batch, tuned = plan.options.batch, plan.reference.batch
    if batch is None:
        return
    if tuned is None:
        yield (
            "The reference has no batch, so batch= moves no rate: give it in tuned_at=, as in"
            " 'r=16,alpha=32,batch=16'."
        )
    elif plan.batch_multiplier != 1.0:
        yield (
            f"From batch {tuned:g} to {batch:g} every rate is multiplied by"
            f" {plan.batch_multiplier:.3g}, a rule of thumb."
        )
    elif batch != tuned:
        yield f"The law {plan.law.name!r} does not move rates with the batch."


def _full_notes(plan: Plan) -> Iterator[str]:
    """Yield a note on the uncertainty of a LoRA rate that is moved to full finetuning without a
    calibration.
    """
    if plan.law.name == "constant":
        yield (
            "No law moves this LoRA rate to full finetuning, whose best rate may be several times"
            " as high or as low: calibrate with full runs."
        )
    elif plan.law.name != "power":
        worth = "is good to a factor of 2 to 4"
        if plan.family not in SIGN_LIKE:
            worth = f"was never tried with {plan.family} optimizers"
        yield (
            f"From a LoRA rate alone the law's rate for full finetuning {worth}, and too high costs"
            " more than too low: start at half of it, or settle it by three full runs (calibrate"
            " with full_trials=3)."
        )


_WARNED: set[type] = set()  # classes of an unknown family, each once


def _family_notes(plan: Plan) -> Iterator[str]:
    """Yield a note on groups that are not sign-like: which law moves their rates, and why."""
    law, family, optimizer = plan.law, plan.family, plan.optimizer
    constant = get_law(plan.options.law).name == "constant"
    if optimizer is None or family == "sign-like" or constant:
        return
    if family == "unknown":
        words = (
            "of an unknown family and is scaled as a sign-like optimizer, such as Adam"
        )
        if plan.use is None and optimizer not in _WARNED:
            _WARNED.add(optimizer)
            warn(f"{optimizer.__name__} is {words}. A calibration measures it.")
    elif family == RANK_AWARE:
        words = (
            f"{family}: by its own rule its updates move with the rank, so all ranks keep one"
            " rate"
        )
    elif family not in FORMS and isinstance(law, Constant):
        words = (
            f"{family}: no form of µA is known to hold for that family, so all ranks have"
            " one rate"
        )
    elif getattr(innermost(law), "family", None) != family:
        words = f"{family}, for which the law {law.name!r} has no form"
    elif FORMS[family].one_rank:
        words = (
            f"{family}: in small runs its best rate followed µA's form with alpha but not with"
            " rank, so its rates do the same"
        )
    else:
        words = (
            f"{family}: µA's form for that family moves its rates, derived for square layers; in"
            " small runs it lost less than one rate"
        )
    yield f"{optimizer.__name__} is {words}."
