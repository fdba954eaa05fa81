"""Read the base learning rate from the user's `lr` or from a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from .._checks import check_lr, check_range, plain_lr, shown
from .._rate import Rate
from .._types import Reference, width_for
from .._warn import warn
from ..errors import OptimizerError, RecipeError
from ..inspection import ReferenceLike, Survey, as_reference
from ..laws import (
    DEFAULT_LAW,
    Law,
    checked_batch_multiplier,
    get_law,
    law_title,
)
from ..recipe import (
    BASE,
    SAME_UPDATES,
    Recipe,
    differences,
    is_for,
    law_multiplier,
    name_pattern,
    plain_value,
    rate,
    settings_of,
    warn_of,
    widened_for,
)

if TYPE_CHECKING:  # the commands convert a rate without importing torch
    from torch import Tensor

Settings = Mapping[str, Any]


class RateAndReason(NamedTuple):
    """The learning rate of a parameter, together with an explanation in words."""

    lr: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """The base learning rate of a model, together with all other values that determine
    the learning rates of its parameters.

    Args:
        law: the scaling law, before it is adapted to an optimizer.
        lr: the base learning rate, or None to use the learning rates of the optimizer
            or its groups.
        reference: the configuration that `lr` was tuned for. None means the most common
            configuration of the model.
        batch: examples or tokens per step of this run.
        steps: training steps of this run.
        recipe: the recipe, if the learning rates come from one.
        rates: explicit learning rates by name pattern.
        other_lr: an explicit learning rate for parameters outside LoRA.
        margin_multiplier: a multiplier for every learning rate. It contains the recipe's
            safety margin, which is wider if this run differs from the trials.
        full_lr: the recipe's learning rate for full finetuning, or None if its trials
            did not include any.
        notes: sentences for the report.
    """

    law: Law
    lr: float | Tensor | None = None
    reference: Reference | None = None
    batch: float | None = None
    steps: int | None = None
    recipe: Recipe | None = None
    rates: Mapping[str, float | Rate] = field(default_factory=dict)
    other_lr: float | Rate | None = None
    margin_multiplier: float = 1.0
    full_lr: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name of the law or recipe that determines the learning rates."""
        if self.recipe is None:
            return law_title(self.law)
        return f"recipe {self.recipe.name!r}"

    def run_multiplier(self, law: Law) -> float:
        """Return the multiplier that adjusts all learning rates to the batch size and
        the steps of this run.

        law: the law in its form for the parameter group.
        """
        tuned = None if self.reference is None else self.reference.batch
        if self.batch is None or tuned is None:
            return self.margin_multiplier
        return self.margin_multiplier * checked_batch_multiplier(
            law, self.batch / tuned
        )

    def explicit_rate(self, name: str, other: bool = False) -> RateAndReason | None:
        """Return the learning rate that the user set for a parameter, or None if there
        is none.

        The learning rate comes from the first pattern in `rates` that matches the
        parameter's name. If no pattern matches and the parameter is outside LoRA,
        `other_lr` is used.

        other: whether the parameter is outside LoRA.
        """
        for pattern, given in self.rates.items():
            if fnmatchcase(name, pattern):  # in the order of the dict
                return RateAndReason(plain_lr(given), "set by rates=")
        if other and self.other_lr is not None:
            return RateAndReason(plain_lr(self.other_lr), "set by other_lr=")
        return None

    def check_given(self, names: Sequence[str]) -> None:
        """Check that all explicit learning rates are valid, and that every pattern
        matches a trainable parameter.
        """
        if self.other_lr is not None:
            check_lr(self.other_lr, "other_lr")
        for pattern, given in self.rates.items():
            check_lr(given, f"rates[{pattern!r}]")
            if not any(fnmatchcase(name, pattern) for name in names):
                example = names[-1]
                raise OptimizerError(
                    f"The pattern {pattern!r} in rates= does not match the name of any trainable"
                    f" parameter. One of the {len(names)} names is {example!r}.",
                    "Change the pattern so that it matches the full name of a parameter. Use * for"
                    " the parts of the name that vary.",
                )

    def recipe_rate(self, name: str, trains: bool) -> RateAndReason | None:
        """Return the recipe's learning rate for a parameter outside LoRA.

        If the recipe's trials trained this parameter, return its learning rate in the
        trials. Otherwise, return the recipe's learning rate for full finetuning. Return
        None if the parameter should train at the base learning rate.

        Raises:
            RecipeError: the parameter trains, but the recipe's trials trained neither it nor the
                full model.
        """
        if self.recipe is None:
            return None
        tried = self.recipe.other_rates.get(name_pattern(name))
        if tried == BASE:
            return RateAndReason(
                self.recipe.lr, "base learning rate, as in the recipe's trials"
            )
        if tried is not None:
            return RateAndReason(
                float(tried), "its learning rate in the recipe's trials"
            )
        if self.full_lr is not None:
            return RateAndReason(
                self.full_lr, "the recipe's learning rate for full finetuning"
            )
        if trains:
            recipe = self.recipe.name
            raise RecipeError(
                f"The recipe {recipe!r} has no learning rate for the parameter {name}, because the"
                " recipe's trials trained neither this parameter nor the full model.",
                f"Set a learning rate with other_lr=, or with rates={{{name!r}: ...}}.",
            )
        return None


def _check_rates(rates: object) -> None:
    """Raise an error if `rates` is not a mapping from name patterns to learning rates."""
    fits = isinstance(rates, Mapping) and all(isinstance(key, str) for key in rates)
    if not fits:
        raise OptimizerError(
            f"rates= must be a dict that maps name patterns to learning rates, but {shown(rates)}"
            " was passed.",
            "Pass a dict such as rates={'*classifier*': 1e-3}. To set one learning rate for all"
            " parameters outside LoRA, use other_lr=.",
        )


def read_source(
    recipe: Recipe | str | os.PathLike[str] | None,
    law: str | Law | None,
    tuned_at: ReferenceLike | None,
    lr: float | Tensor | None,
    batch: float | None,
    steps: int | None,
    rates: Mapping[str, float | Rate],
    other_lr: float | Rate | None,
) -> Source:
    """Read the arguments of `RankAwareOptimizer` that determine the learning rates.

    Raises:
        OptimizerError: an argument is not usable, is already part of the recipe, or
            only has an effect with a recipe.
        InvalidReferenceError: `tuned_at` describes no reference.
        LawError: the law is unknown.
        RecipeError: the recipe cannot be read.
    """
    given: dict[str, Any] = {"batch": batch, "rates": rates, "other_lr": other_lr}
    _check_rates(rates)
    if batch is not None:
        check_range("batch", batch, "batch", OptimizerError)
    if recipe is None:
        if steps is not None:
            raise OptimizerError(
                f"steps={steps!r} has no effect without recipe=.",
                "Remove steps=, or pass a recipe as recipe=.",
            )
        reference = None if tuned_at is None else as_reference(tuned_at)
        chosen = get_law(DEFAULT_LAW if law is None else law)
        return Source(law=chosen, lr=lr, reference=reference, **given)
    for argument, value in {"lr": lr, "tuned_at": tuned_at, "law": law}.items():
        if value is not None:
            raise OptimizerError(
                f"{argument}= cannot be used together with recipe=, because the recipe already"
                f" contains a value for {argument}.",
                f"Remove {argument}= to use the value in the recipe, or remove recipe= to use your"
                " value.",
            )
    # The recipe's law and reference are used as if they were law= and tuned_at=.
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return Source(
        law=loaded.law,
        reference=loaded.reference,
        steps=steps,
        recipe=loaded,
        **given,
    )


def on_this_model(
    source: Source,
    survey: Survey,
    native: type,
    in_groups: Sequence[Settings],
) -> Source:
    """Convert a recipe's learning rates to the user's model and to the settings of this
    run.

    The function warns if the model is different from the recipe's model, or if the run
    is different from the recipe's trials. If the source of the learning rate is not a
    recipe, the function returns the source unchanged.

    Args:
        source: the source as it was read.
        survey: the parameters of the model that train.
        native: the optimizer's class.
        in_groups: the settings in force in each group that has LoRA matrices.
    """
    recipe = source.recipe
    if recipe is None:
        return source
    # The recipe predicts a learning rate at the model's most common configuration. The law then
    # converts this rate to the model's other ranks, in the same way as without a recipe.
    own = survey.dominant()
    init = recipe.reference.init
    width = width_for(survey, own.method, init)
    at = replace(own, init=init if own.method == "full" else own.init, fan_in=width)
    recipe, other_model = widened_for(recipe, survey)
    other_run = _other_run(source, recipe, native, in_groups)
    here = rate(recipe, at)
    batch = None if recipe.batch is None else source.batch
    this_run = rate(recipe, replace(at, batch=batch), source.steps)
    notes = [text for text in (other_model, other_run) if text]
    for text in notes:
        warn(text)
    warn_of(recipe, here)  # other steps are mentioned in `other_run`
    if is_for(recipe, native):
        notes.append(
            f"recipe {recipe.name!r}: the best learning rate lies between {this_run.low:.3g} and"
            f" {this_run.high:.3g} with a probability of 90 % at {this_run.configuration}."
        )
        notes += this_run.notes
    full_lr = None
    if recipe.full_seen:
        width = survey.full_width(init)
        full = Reference(method="full", init=init, fan_in=width)
        full_lr = rate(recipe, full).lr
    reference = recipe.reference.resolve(survey)
    if reference.method == at.method == "lora":
        # The assigner only converts between pairs of the same init. To get back to `here.lr`, the
        # reference must have the same init too.
        reference = replace(reference, init=at.init)
    return replace(
        source,
        recipe=recipe,
        lr=here.lr / law_multiplier(recipe, at, reference),
        # The assigner applies the law's batch rule in each group. What remains between that and
        # this run's learning rate is the safety margin, wider for a run unlike the trials.
        margin_multiplier=this_run.lr / here.lr / source.run_multiplier(recipe.law),
        full_lr=full_lr,
        notes=tuple(notes),
    )


def _other_run(
    source: Source, recipe: Recipe, native: type, in_groups: Sequence[Settings]
) -> str:
    """Describe the differences between this run and the recipe's trials, and suggest a
    remedy.

    If the run and the trials do not differ, return an empty string.
    """
    if is_for(recipe, native):
        trials = plain_value(recipe.settings)
        known = in_groups[0].keys() - SAME_UPDATES
        run = settings_of(in_groups, [name for name in trials if name in known])
        cure = (
            "With other values, its learning rates are less certain. To train with the recipe's"
            " settings, pass **recipe.settings."
        )
    else:
        theirs = recipe.optimizer.rpartition(".")[2]
        ours = native.__name__
        trials = {"optimizer": theirs}
        run = {"optimizer": ours}
        cure = (
            f"Its learning rates are for {theirs}, but {ours} needs different ones. Run the"
            f" calibration with {ours} instead."
        )
    # If only one side knows a value, it cannot count as a difference.
    for name in ("batch", "steps"):
        tried = getattr(recipe, name)
        now = getattr(source, name)
        if tried is not None and now is not None:
            trials[name], run[name] = tried, now
    words = differences(trials, run)
    return f"Recipe {recipe.name!r} was made with {words}. {cure}" if words else ""
