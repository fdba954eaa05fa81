"""Where a base rate comes from, and how the run moves it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .._checks import check_lr, check_range, plain_lr
from .._rate import Rate
from .._types import Reference, width_for
from .._warn import warn
from ..errors import OptimizerError, RecipeError
from ..inspection import ReferenceLike, Survey, as_reference
from ..laws import (
    DEFAULT_LAW,
    Law,
    checked_batch_multiplier,
    checked_multiplier,
    get_law,
    law_title,
)
from ..recipe import (
    BASE,
    SAME_UPDATES,
    Recipe,
    differences,
    is_for,
    name_pattern,
    plain_value,
    rate,
    settings_of,
    warn_of,
    widened_for,
)

Settings = Mapping[str, Any]


class Rated(NamedTuple):
    """A learning rate of a parameter, and the reason for it in words."""

    lr: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A base rate, as given or a recipe's, where it was tuned, and the law by which it moves.

    lr: None for the optimizer's or its groups' own. reference: None for the model's most common
    configuration. batch, steps: those of the run. rates, other_lr: given outright, by name pattern
    and for what is no factor. steps_multiplier: the factor of every rate for the steps.
    full_lr: the recipe's rate of full finetuning, None if its trials did not include it. notes:
    sentences for the report.
    """

    law: Law
    lr: Any = None
    reference: Reference | None = None
    batch: float | None = None
    steps: int | None = None
    recipe: Recipe | None = None
    rates: Mapping[str, float | Rate] = field(default_factory=dict)
    other_lr: float | Rate | None = None
    steps_multiplier: float = 1.0
    full_lr: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What moves the rates, in words."""
        if self.recipe is None:
            return law_title(self.law)
        return f"recipe {self.recipe.name!r}"

    def run_multiplier(self, law: Law) -> float:
        """Return the factor of every rate for the run's batch and steps."""
        tuned = None if self.reference is None else self.reference.batch
        if self.batch is None or tuned is None:
            return self.steps_multiplier
        return self.steps_multiplier * checked_batch_multiplier(law, self.batch / tuned)

    def rate_of(self, name: str, other: bool = False) -> Rated | None:
        """Return the rate that was given outright: of the first pattern that matches `name`, else
        `other_lr` if it is no factor (`other`).
        """
        for pattern, given in self.rates.items():
            if fnmatchcase(name, pattern):
                return Rated(plain_lr(given), "given by rates=")
        if other and self.other_lr is not None:
            return Rated(plain_lr(self.other_lr), "given by other_lr=")
        return None

    def check_given(self, names: Sequence[str]) -> None:
        """Raise if a rate that was given outright is impossible, or its pattern matches none of the
        trainable parameters.
        """
        if self.other_lr is not None:
            check_lr(self.other_lr, "other_lr")
        for pattern, given in self.rates.items():
            check_lr(given, f"rates[{pattern!r}]")
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptimizerError(
                    f"The pattern {pattern!r} of rates= matches none of {len(names)} trainable"
                    " parameters.",
                    f"Give an fnmatch pattern of full names, such as {names[-1]!r}.",
                )

    def rate_of_other(self, name: str, trains: bool) -> Rated | None:
        """Return the recipe's rate of a parameter that is no factor: that of the trials, else that
        of full finetuning. None stands for the base rate.
        """
        if self.recipe is None:
            return None
        tried = self.recipe.other_rates.get(name_pattern(name))
        if tried == BASE:
            return Rated(self.recipe.lr, "the base rate, as in the recipe's trials")
        if tried is not None:
            return Rated(float(tried), "its rate in the recipe's trials")
        if self.full_lr is not None:
            return Rated(self.full_lr, "full finetuning's rate by the recipe")
        if trains:
            raise RecipeError(
                f"The trials of recipe {self.recipe.name!r} trained neither {name} nor the full"
                " model, so it has no rate.",
                "Give other_lr=, or rates= for its name.",
            )
        return None


def read_source(
    recipe: Recipe | str | os.PathLike[str] | None,
    law: str | Law | None,
    tuned_at: ReferenceLike | None,
    lr: Any,
    batch: float | None,
    steps: int | None,
    rates: Mapping[str, float | Rate],
    other_lr: float | Rate | None,
) -> Source:
    """Return the source of the rates. Raise if something is given that a recipe includes, or that
    needs one.
    """
    given: dict[str, Any] = {"batch": batch, "rates": rates, "other_lr": other_lr}
    if batch is not None:
        check_range("batch", batch, "batch", OptimizerError)
    if recipe is None:
        if steps is not None:
            raise OptimizerError(
                "steps= was given without recipe=, so it has no effect.",
                "Leave it out.",
            )
        reference = None if tuned_at is None else as_reference(tuned_at)
        chosen = get_law(DEFAULT_LAW if law is None else law)
        return Source(law=chosen, lr=lr, reference=reference, **given)
    for name, value in {"lr": lr, "tuned_at": tuned_at, "law": law}.items():
        if value is not None:
            raise OptimizerError(
                f"Both recipe= and {name}= were given.",
                "Give only the recipe, which includes it.",
            )
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
    """Return a source with the rates of a model: a recipe's move to its configuration and to the
    run's steps. Warn if the model is another than the recipe's, and once if the run differs from
    its trials.

    in_groups: the settings in force in each group that has factors.
    """
    recipe = source.recipe
    steps = source.steps
    if recipe is None:
        return source
    own = survey.dominant()
    init = recipe.reference.init
    width = width_for(survey, own.method, init)
    at = replace(own, init=init if own.method == "full" else own.init, fan_in=width)
    recipe, strange = widened_for(recipe, survey)
    differing = _differing(source, recipe, native, in_groups)
    here = rate(recipe, at)
    steps_multiplier = 1.0 if steps is None else rate(recipe, at, steps).lr / here.lr
    remarks = [text for text in (strange, differing) if text]
    for text in remarks:
        warn(text)
    warn_of(recipe, here)  # other steps are among the differences
    if is_for(recipe, native):
        batch = None if recipe.batch is None else source.batch
        best = rate(recipe, replace(at, batch=batch), steps)
        remarks.append(
            f"recipe {recipe.name!r}: the best rate lies between {best.low:.3g} and"
            f" {best.high:.3g} with 90 % at {best.configuration}."
        )
        remarks += best.notes
    full_lr = None
    if recipe.full_seen:
        width = survey.full_width(init)
        full = Reference(method="full", init=init, fan_in=width)
        full_lr = rate(recipe, full).lr
    reference = recipe.reference.resolve(survey)
    return replace(
        source,
        recipe=recipe,
        lr=here.lr / checked_multiplier(recipe.law, at.as_factor(), reference),
        steps_multiplier=steps_multiplier,
        full_lr=full_lr,
        notes=tuple(remarks),
    )


def _differing(
    source: Source, recipe: Recipe, native: type, in_groups: Sequence[Settings]
) -> str:
    """Return how the run differs from a recipe's trials, and what to do about it; "" if it does
    not.
    """
    if is_for(recipe, native):
        trials = plain_value(recipe.settings)
        known = in_groups[0].keys() - SAME_UPDATES
        run = settings_of(in_groups, [name for name in trials if name in known])
        cure = (
            "Its rates belong to these settings: give **recipe.settings. They are less certain for"
            " others."
        )
    else:
        theirs = recipe.optimizer.rpartition(".")[2]
        ours = native.__name__
        trials = {"optimizer": theirs}
        run = {"optimizer": ours}
        cure = f"Its rates are for {theirs} and not for {ours}: calibrate with {ours}."
    for name in ("batch", "steps"):
        tried = getattr(recipe, name)
        now = getattr(source, name)
        if tried is not None and now is not None:
            trials[name], run[name] = tried, now
    words = differences(trials, run)
    return f"Recipe {recipe.name!r} was made with {words}. {cure}" if words else ""
