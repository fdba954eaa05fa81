"""Where the base learning rate comes from: an `lr` that was tuned somewhere, or a recipe."""

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
    """A learning rate of a parameter, and the reason for it in words."""

    lr: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """The base learning rate, where it was tuned, and everything else that decides the learning
    rates of a model.

    Args:
        law: the scaling law, not yet in the form for an optimizer.
        lr: the base learning rate. None to use the optimizer's own, or its groups'.
        reference: where `lr` was tuned. None stands for the model's most common configuration.
        batch: examples or tokens per step of this run.
        steps: training steps of this run.
        recipe: the recipe, if the learning rates come from one.
        rates: explicit learning rates by name pattern.
        other_lr: an explicit learning rate for parameters outside LoRA.
        margin_multiplier: multiplies every learning rate, because a recipe's safety margin is wider
            for a run unlike its trials.
        full_lr: the recipe's learning rate for full finetuning. None if its trials had none.
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
        """The law or the recipe that decides the learning rates, in words."""
        if self.recipe is None:
            return law_title(self.law)
        return f"recipe {self.recipe.name!r}"

    def run_multiplier(self, law: Law) -> float:
        """Return the multiplier of every learning rate for this run's batch and steps.

        law: the law in the form for a group.
        """
        tuned = None if self.reference is None else self.reference.batch
        if self.batch is None or tuned is None:
            return self.margin_multiplier
        return self.margin_multiplier * checked_batch_multiplier(
            law, self.batch / tuned
        )

    def explicit_rate(self, name: str, other: bool = False) -> RateAndReason | None:
        """Return the explicit learning rate of a parameter: the first match in `rates`, else
        `other_lr`. None if there is neither.

        other: whether the parameter is outside LoRA, so that `other_lr` applies to it.
        """
        for pattern, given in self.rates.items():
            if fnmatchcase(name, pattern):  # in the order of the dict
                return RateAndReason(plain_lr(given), "set by rates=")
        if other and self.other_lr is not None:
            return RateAndReason(plain_lr(self.other_lr), "set by other_lr=")
        return None

    def check_given(self, names: Sequence[str]) -> None:
        """Raise an error if an explicit learning rate is impossible, or if its pattern matches none
        of the parameters that train.
        """
        if self.other_lr is not None:
            check_lr(self.other_lr, "other_lr")
        for pattern, given in self.rates.items():
            check_lr(given, f"rates[{pattern!r}]")
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptimizerError(
                    f"The pattern {pattern!r} of rates= matches none of the {len(names)} parameters"
                    " that train.",
                    f"Patterns are compared with full names, such as {names[-1]!r}. Use * for the"
                    " parts that vary.",
                )

    def recipe_rate(self, name: str, trains: bool) -> RateAndReason | None:
        """Return the recipe's learning rate for a parameter outside LoRA: the one that it
        had in the trials, else the one for full finetuning. None stands for the base learning rate.

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
            raise RecipeError(
                f"Recipe {self.recipe.name!r} has no learning rate for {name}: its trials trained"
                " neither this parameter nor the full model.",
                "Set its learning rate by other_lr=, or by rates= for its name.",
            )
        return None


def _check_rates(rates: object) -> None:
    """Raise an error if `rates` does not map patterns to learning rates."""
    fits = isinstance(rates, Mapping) and all(isinstance(key, str) for key in rates)
    if not fits:
        raise OptimizerError(
            f"rates is {shown(rates)}, but it must map name patterns to learning rates.",
            "Pass it as rates={'*classifier*': 1e-3}. For one learning rate of all parameters"
            " outside LoRA use other_lr=.",
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
    """Read the arguments of `RankAwareOptimizer` that decide learning rates.

    Raises:
        OptimizerError: an argument is impossible, stands beside a recipe that already includes it,
            or is meaningless without a recipe.
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
                "Remove it.",
            )
        reference = None if tuned_at is None else as_reference(tuned_at)
        chosen = get_law(DEFAULT_LAW if law is None else law)
        return Source(law=chosen, lr=lr, reference=reference, **given)
    for name, value in {"lr": lr, "tuned_at": tuned_at, "law": law}.items():
        if value is not None:
            raise OptimizerError(
                f"recipe= and {name}= were both passed, but a recipe includes its own {name}.",
                f"Remove {name}=, or remove recipe=.",
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
    """Return the source for one model: a recipe's learning rates are converted to the model's
    configuration and to this run. Without a recipe nothing changes.

    Warn if the model is another than the recipe's, and once if the run differs from the trials.

    Args:
        source: the source as it was read.
        survey: the parameters of the model that train.
        native: the optimizer's class.
        in_groups: the settings in force in each group that has LoRA matrices.
    """
    recipe = source.recipe
    if recipe is None:
        return source
    # The recipe is asked for the model's most common configuration. The law converts from there to
    # the model's other ranks, as it does without a recipe.
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
        # The assigner converts within the init of a pair. So does the way back from `here.lr`.
        reference = replace(reference, init=at.init)
    return replace(
        source,
        recipe=recipe,
        lr=here.lr / law_multiplier(recipe, at, reference),
        # The law's rule for the batch is applied by group. The rest of the way to this run's
        # learning rate is the safety margin, which is wider for a run unlike the trials.
        margin_multiplier=this_run.lr / here.lr / source.run_multiplier(recipe.law),
        full_lr=full_lr,
        notes=tuple(notes),
    )


def _other_run(
    source: Source, recipe: Recipe, native: type, in_groups: Sequence[Settings]
) -> str:
    """Return how this run differs from the recipe's trials, with the remedy, "" if it does not
    differ.
    """
    if is_for(recipe, native):
        trials = plain_value(recipe.settings)
        known = in_groups[0].keys() - SAME_UPDATES
        run = settings_of(in_groups, [name for name in trials if name in known])
        cure = (
            "Its learning rates are less certain with other values. To train with the recipe's"
            " settings, pass **recipe.settings."
        )
    else:
        theirs = recipe.optimizer.rpartition(".")[2]
        ours = native.__name__
        trials = {"optimizer": theirs}
        run = {"optimizer": ours}
        cure = (
            f"Its learning rates are for {theirs}, and {ours} needs others: calibrate with"
            f" {ours}."
        )
    # A value that one side does not know is no difference.
    for name in ("batch", "steps"):
        tried = getattr(recipe, name)
        now = getattr(source, name)
        if tried is not None and now is not None:
            trials[name], run[name] = tried, now
    words = differences(trials, run)
    return f"Recipe {recipe.name!r} was made with {words}. {cure}" if words else ""
