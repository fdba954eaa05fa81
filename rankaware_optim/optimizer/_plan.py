"""The plan: what every parameter is, and the rule by which it gets a rate, from a survey, a law and
the user's options.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, NamedTuple

from .._checks import check_lr, is_number, plain_lr
from .._optimizers import (
    RANK_AWARE,
    Known,
    goes_to_adam,
    known_optimizer,
    optimizer_family,
)
from .._rate import Rate
from .._types import Factor, Method, Reference, Survey, dense, init_text, width_for
from .._warn import warn
from ..errors import OptimizerError
from ..inspection import is_other_adapter
from ..laws import (
    DEFAULT_LAW,
    FORMS,
    SIGN_LIKE,
    Constant,
    Law,
    beyond_batches,
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


_CLASSIFIER = re.compile(r"(^|\.)(score|classifier|classification_head)(\.|$)")
_NEW_HEAD = (
    "A new text classifier often wants 4 times the base rate at which it trains here: other_lr= or"
    " rates= sets it."
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

    def check_patterns(self, names: Sequence[str]) -> None:
        """Raise if a pattern of `rates` matches none of the trainable parameters."""
        for pattern in self.rates:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptimizerError(
                    f"The pattern {pattern!r} of rates= matches none of {len(names)} trainable"
                    " parameters.",
                    f"Give an fnmatch pattern of full names, such as {names[-1]!r}.",
                )

    def rate_of(self, name: str, other: bool = False) -> float | None:
        """Return the rate of the first pattern that matches `name`, else `other_lr` if it is no
        factor (`other`), or None.
        """
        for pattern, rate in self.rates.items():
            if fnmatchcase(name, pattern):
                return float(rate)
        return plain_lr(self.other_lr) if other else None


class Label(NamedTuple):
    """What a parameter is, and its rate, as tags of its group. Parameters with equal labels share a
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


class Rule(NamedTuple):
    """How the groups of one family of optimizers get their rates.

    law: bound to the optimizer. by_run: the factor of all rates for the run's batch and steps.
    """

    law: Law
    family: str = "sign-like"
    by_run: float = 1.0


class Widths(NamedTuple):
    """From where and to where a law moves the rates of a model.

    reference: with its fan-in. model: the width of the model, see `width_for`.
    """

    reference: Reference
    model: float


class RecipeUse(NamedTuple):
    """A recipe in a run: the base rate, notes, the factor of every rate for the run's steps, and
    the rates of other parameters.
    """

    recipe: Recipe
    lr: float
    notes: tuple[str, ...]
    by_steps: float
    others: OtherRates


@dataclass(frozen=True)
class Plan:
    """The options resolved for one model and optimizer. It maps a parameter to its `Label`.

    survey: of what trains, before training. reference: with its `fan_in`. width: the model's.
    widths: of each model, by its number, where there are several. use: the recipe of the base rate,
    or None. optimizer, settings: the class, and what it was given for all groups.
    """

    options: PlanOptions
    survey: Survey = field(repr=False)
    reference: Reference
    width: float
    method: Method
    widths: Mapping[str, Widths] = field(default_factory=dict, repr=False)
    use: RecipeUse | None = field(default=None, repr=False, compare=False)
    optimizer: type | None = field(default=None, repr=False)
    settings: Settings = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @cached_property
    def known(self) -> Known:
        """The optimizer's known properties."""
        return Known() if self.optimizer is None else known_optimizer(self.optimizer)[1]

    def goes_to_adam(self, settings: Settings, shape: Sequence[int]) -> bool:
        """Return whether the optimizer hands a parameter of a group with these settings to its
        Adam.
        """
        return goes_to_adam(self.known, {**self.settings, **settings}, shape)

    def rule_for(self, settings: Settings, to_adam: bool = False) -> Rule:
        """Return the rule of a parameter group, whose settings may put it into another family.

        Args:
            settings: the group's own settings.
            to_adam: whether it holds what a spectral optimizer hands to its Adam.
        """
        given = {**self.settings, **settings}
        if to_adam:
            given["use_muon"] = False
        law, family = get_law(self.options.law), "sign-like"
        if self.optimizer is not None:
            law = bound_law(law, self.optimizer, given)
            family = optimizer_family(self.optimizer, given)
        by_run = 1.0 if self.use is None else self.use.by_steps
        batch, tuned = self.options.batch, self.reference.batch
        if batch is not None and tuned is not None:
            by_run *= checked_batch_multiplier(law, batch / tuned)
        return Rule(law, family, by_run)

    @cached_property
    def rule(self) -> Rule:
        """That of groups without settings of their own."""
        return self.rule_for({})

    def label(
        self,
        name: str,
        factor: Factor | None,
        rule: Rule,
        *,
        own_lr: bool = False,
        trains: bool = True,
    ) -> Label:
        """Return the label of a parameter.

        Args:
            name: the parameter's name.
            factor: the LoRA factor or whole weight that it is, None for other parameters.
            rule: that of its group.
            own_lr: whether the user's group has an explicit rate. For other parameters it takes
                precedence over a recipe.
            trains: whether the parameter trains. One that does not needs no rate.
        """
        label = Label(rule.by_run, rank_family=rule.family)
        if factor is not None:
            label = label._replace(
                lora_role=factor.role,
                lora_rank=factor.rank,
                lora_scale=factor.scaling,
                lora_init=factor.init,
            )
        pinned = self.options.rate_of(name, other=factor is None)
        if factor is None and self.method == "full":
            factor = Factor("other parameters", "full", None, self.width, self.width)
        by_recipe = self.use is not None and factor is None and not own_lr
        if pinned is None and by_recipe:
            pinned = self._rate_by_recipe(name, rule, trains)
        if pinned is not None:
            return label._replace(rank_multiplier=1.0, pinned_lr=pinned)
        if factor is None:
            return label
        moved = self.multiplier(factor, rule.law)
        return label._replace(rank_multiplier=rule.by_run * moved)

    def _rate_by_recipe(self, name: str, rule: Rule, trains: bool) -> float | None:
        rate = None if self.use is None else self.use.others.rate(name, trains)
        return None if rate is None else rate * rule.by_run

    def multiplier(self, factor: Factor, law: Law | None = None) -> float:
        """Return the law's multiplier for `factor`, at the model's width and within the law of the
        factor's init.

        Pairs in which neither factor starts at zero keep the base rate. An embedding's input is
        one-hot, so its width is 1, and its rate moves only within its init. It does not move from a
        full-finetuning rate, which has no init.
        """
        law = self.rule.law if law is None else law
        embedding = factor.kind == "embedding"
        here = Widths(self.reference, self.width)
        reference, width = self.widths.get(_model_number(factor), here)
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
        return checked_multiplier(
            law, replace(factor, fan_in=width, init=init), reference
        )


def _model_number(factor: Factor) -> str:
    return factor.name.partition(".")[0]


def _widths(survey: Survey, method: Method, reference: Reference) -> Widths:
    width = width_for(survey, method, reference.init)
    return Widths(reference.resolve(survey), width)


def make_plan(
    survey: Survey,
    options: PlanOptions,
    optimizer_class: type | None = None,
    settings: Settings | None = None,
    use: RecipeUse | None = None,
    groups: Sequence[Settings] = ({},),
    *,
    are_several: bool = False,
) -> Plan:
    """Bind the law, resolve the reference and match the user's patterns. Nothing is built yet.

    groups: the settings of each of the user's groups, of whose families the notes speak.
    are_several: whether the survey is of several models, whose numbers begin its names.
    """
    options.check_patterns([*(f.name for f in survey.factors), *survey.other])
    moved = tuple(f for f in survey.factors if options.rate_of(f.name) is None)
    of_moved = replace(survey, factors=moved)
    is_full = "full" in {f.role for f in survey.factors}
    method: Method = "full" if is_full else "lora"
    reference = options.tuned_at
    if reference is None:  # without pairs no rate is moved
        reference = survey.dominant() if survey.factors else Reference(method="full")
    by_model: dict[str, list[Factor]] = {}
    for factor in moved if are_several else ():
        by_model.setdefault(_model_number(factor), []).append(factor)
    widths = {}
    for number, factors in by_model.items():
        of_model = replace(survey, factors=tuple(factors))
        widths[number] = _widths(of_model, method, reference)
    plan = Plan(
        options,
        survey,
        *_widths(of_moved, method, reference),
        method,
        widths,
        use,
        optimizer_class,
        settings or {},
    )
    return replace(plan, notes=tuple(_notes(plan, groups)))


# --- notes: rows of a condition and a sentence ----------------------------------------------------


def _notes(plan: Plan, groups: Iterable[Settings]) -> Iterator[str]:
    """Yield what a report says of a plan."""
    if plan.use is not None:
        yield from plan.use.notes
    yield from plan.survey.notes
    yield from _adapter_notes(plan)
    yield from _move_notes(plan)
    shapes, by_family = set(map(_shape_of, plan.survey.factors)), {}
    for settings in groups:
        handed = {plan.goes_to_adam(settings, shape) for shape in shapes} or {False}
        for rule in (plan.rule_for(settings, to_adam) for to_adam in sorted(handed)):
            by_family[rule.family] = rule
    for rule in by_family.values():
        yield from _family_note(plan, rule)
    yield from _batch_note(plan)


def _shape_of(factor: Factor) -> tuple[int, int]:
    rows = factor.rank if factor.role == "A" else factor.fan_out
    columns = factor.rank if factor.role == "B" else factor.fan_in
    return int(rows or 1), int(columns or 1)


def _warn_of_adapters_without_a_law(plan: Plan) -> None:
    """Warn where a rate is said to be moved and some adapters stay at the base rate."""
    kinds = plan.survey.unsupported
    names = [name for name in kinds if is_other_adapter(name)]
    if not names or plan.options.tuned_at is None:
        return
    words = " and ".join(sorted({kinds[name] for name in names}))
    warn(
        f"No law covers {words}: {len(names)} of its parameters, such as {names[0]}, train at the"
        " base rate, whatever tuned_at= says. rates= gives them another."
    )


def _adapter_notes(plan: Plan) -> list[str]:
    """Return what is assumed of the adapters' ranks and inits."""
    reference, factors = plan.reference, plan.survey.factors
    inits = {f.init for f in factors}
    kinds = {(f.rank, f.scaling, f.init) for f in factors}
    if "other" in inits:
        warn(_NO_ZERO)
    _warn_of_adapters_without_a_law(plan)
    at_base = [n for n in plan.survey.other if plan.options.rate_of(n, True) is None]
    is_lora = plan.method == reference.method == "lora"
    another = "B" if reference.init == "A" else "A"
    return _those_that_apply(
        ("other" in inits, _NO_ZERO),
        (
            is_lora and plan.use is None and any(map(_CLASSIFIER.search, at_base)),
            _NEW_HEAD,
        ),
        (
            plan.options.tuned_at is None and len(kinds) > 1,
            f"tuned_at not given: lr counts as tuned at {reference}, the most common of this"
            " model.",
        ),
        (
            "unknown" in inits,
            "The init of some adapters could not be read. It is assumed that they started at B ="
            " 0.",
        ),
        (
            is_lora and another in {f.init for f in dense(factors)},
            f"Adapters at {init_text(another)} are scaled within their own init, though the rate"
            f" was tuned at {init_text(reference.init)}: tune or calibrate there.",
        ),
    )


def _move_notes(plan: Plan) -> list[str]:
    """Return what is uncertain of the moves."""
    law, family = plan.rule.law, plan.rule.family
    to_full = plan.method == "full" and plan.reference.method == "lora"
    worth = "is good to a factor of 2 to 4"
    if family not in SIGN_LIKE:
        worth = f"was never tried with {family} optimizers"
    return _those_that_apply(
        (
            to_full and law.name == "constant",
            "No law moves this LoRA rate to full finetuning, whose best rate may be several times"
            " as high or as low: calibrate with full runs.",
        ),
        (
            to_full and law.name not in ("constant", "power"),
            f"From a LoRA rate alone the law's rate for full finetuning {worth}, and too high costs"
            " more than too low: start at half of it, or settle it by three full runs (calibrate"
            " with full_trials=3).",
        ),
    )


def _those_that_apply(*rows: tuple[bool, str]) -> list[str]:
    return [sentence for applies, sentence in rows if applies]


def _batch_note(plan: Plan) -> Iterator[str]:
    """Yield what the run's batch does to the rates."""
    batch, tuned, law = plan.options.batch, plan.reference.batch, plan.rule.law
    if batch is None or batch == tuned:
        return
    if tuned is None:
        yield (
            "The reference has no batch, so batch= moves no rate: give it in tuned_at=, as in"
            " 'r=16,alpha=32,batch=16'."
        )
        return
    ratio = batch / tuned
    by_batch = checked_batch_multiplier(law, ratio)
    if by_batch == 1.0:
        yield f"The law {law.name!r} does not move rates with the batch."
    else:
        yield (
            f"From batch {tuned:g} to {batch:g} every rate is multiplied by"
            f" {by_batch:.3g}{beyond_batches(ratio)}: a rule of thumb."
        )


_WARNED: set[type] = set()  # classes of an unknown family, each once


def _family_note(plan: Plan, rule: Rule) -> list[str]:
    """Return a note on groups that are not sign-like: which law moves their rates, and why."""
    law, family, optimizer = rule.law, rule.family, plan.optimizer
    is_constant = get_law(plan.options.law).name == "constant"
    if optimizer is None or family == "sign-like" or is_constant:
        return []
    form = FORMS.get(family)
    words = _those_that_apply(
        (
            family == "unknown",
            "of an unknown family and is scaled as a sign-like optimizer, such as Adam",
        ),
        (
            family == RANK_AWARE,
            f"{family}: by its own rule its updates move with the rank, so all ranks keep one rate",
        ),
        (
            form is None and isinstance(law, Constant),
            f"{family}: no form of µA is known to hold for that family, so all ranks have one rate",
        ),
        (
            getattr(innermost(law), "family", None) != family,
            f"{family}, for which the law {law.name!r} has no form",
        ),
        (
            form is not None and form.one_rank,
            f"{family}: in small runs its best rate followed µA's form with alpha but not with"
            " rank, so its rates do the same",
        ),
        (
            True,
            f"{family}: µA's form for that family moves its rates, derived for square layers; in"
            " small runs it lost less than one rate",
        ),
    )[0]
    if family == "unknown" and plan.use is None and optimizer not in _WARNED:
        _WARNED.add(optimizer)
        warn(f"{optimizer.__name__} is {words}. A calibration measures it.")
    return [f"{optimizer.__name__} is {words}."]
