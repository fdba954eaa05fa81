"""Where a base rate comes from, and how the run moves it: `Tuned`, or `ByRecipe`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._checks import is_number
from .._optimizers import defaults_of, known_optimizer, optimizer_family
from .._types import Rated, Reference, Survey
from .._warn import warn
from ..errors import OptimizerError
from ..inspection import ReferenceLike, as_reference
from ..laws import DEFAULT_LAW, Law, checked_batch_multiplier, get_law, law_title
from ..recipe import (
    SAME_UPDATES,
    OtherRates,
    Recipe,
    base_lr,
    configuration_of,
    differences,
    is_for,
    on_model,
    other_rates_on,
    plain_value,
    rate,
    settings_of,
    warn_of,
)

if TYPE_CHECKING:
    from ._user_groups import UserGroup

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A base rate that was tuned at a reference, and the law by which it moves.

    lr: None for the optimizer's or its groups' own. reference: None for the model's most common
    configuration. batch, steps: those of the run.
    """

    law: Law
    lr: Any = None
    reference: Reference | None = None
    batch: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        batch = self.batch
        if batch is not None and not (is_number(batch) and 0 < batch < 2**63):
            raise OptimizerError(
                f"batch is {batch!r}.", "Give a positive number, or leave it out."
            )

    @property
    def title(self) -> str:
        """What moves the rates, in words."""
        return law_title(self.law)

    @property
    def words(self) -> str:
        """The same as the reason of one rate."""
        return self.title.removeprefix("law ")

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the report."""
        return ()

    def by_run(self, law: Law) -> float:
        """Return the factor of every rate for the run's batch and steps."""
        tuned = None if self.reference is None else self.reference.batch
        if self.batch is None or tuned is None:
            return 1.0
        return checked_batch_multiplier(law, self.batch / tuned)

    def other(self, name: str, trains: bool) -> Rated | None:
        """Return the rate of a parameter that is no factor, None for the base rate."""
        return None


@dataclass(frozen=True, kw_only=True)
class ByRecipe(Tuned):
    """A recipe's base rate on a model.

    by_steps: the factor of every rate for the run's steps. others: the rates of what is no factor.
    remarks: sentences for the report.
    """

    recipe: Recipe
    by_steps: float = 1.0
    others: OtherRates | None = None
    remarks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"recipe {self.recipe.name!r}"

    @property
    def words(self) -> str:
        return "recipe"

    @property
    def notes(self) -> tuple[str, ...]:
        return self.remarks

    def by_run(self, law: Law) -> float:
        return self.by_steps * super().by_run(law)

    def other(self, name: str, trains: bool) -> Rated | None:
        return None if self.others is None else self.others.rate(name, trains)


def read_source(
    recipe: Recipe | str | os.PathLike[str] | None,
    law: str | Law | None,
    tuned_at: ReferenceLike | None,
    lr: Any,
    batch: float | None,
    steps: int | None,
) -> Tuned:
    """Return the source of the base rate. Raise if something is given that a recipe includes, or
    that needs one.
    """
    if recipe is None:
        if steps is not None:
            raise OptimizerError(
                "steps= was given without recipe=, so it has no effect.",
                "Leave it out.",
            )
        reference = None if tuned_at is None else as_reference(tuned_at)
        chosen = get_law(DEFAULT_LAW if law is None else law)
        return Tuned(law=chosen, lr=lr, reference=reference, batch=batch)
    for name, value in {"lr": lr, "tuned_at": tuned_at, "law": law}.items():
        if value is not None:
            raise OptimizerError(
                f"Both recipe= and {name}= were given.",
                "Give only the recipe, which includes it.",
            )
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return ByRecipe(
        recipe=loaded,
        law=loaded.law,
        reference=loaded.reference,
        batch=batch,
        steps=steps,
    )


def on_this_model(
    source: Tuned,
    survey: Survey,
    native: type,
    settings: Settings,
    groups: Sequence[UserGroup],
) -> Tuned:
    """Return a source with the rates of a model: a recipe's move to its configuration and to the
    run's steps. Warn if the model is another than the recipe's, and once if the run differs from
    its trials.

    settings: those given to the optimizer for all groups.
    """
    if not isinstance(source, ByRecipe):
        return source
    recipe, steps = source.recipe, source.steps
    batch = None if recipe.batch is None else source.batch
    at, remarks = configuration_of(recipe, survey), []
    recipe, strange = on_model(recipe, survey)
    if strange:
        warn(strange)
        remarks.append(strange)
    here, by_steps = rate(recipe, at), 1.0
    warn_of(recipe, here)  # other steps are said below
    if steps is not None:
        by_steps = rate(recipe, at, steps).lr / here.lr
    in_force = _settings_in_force(recipe, survey, native, settings, groups)
    if differing := _differing(source, native, in_force):
        warn(differing)
        remarks.append(differing)
    if is_for(recipe, native):
        best = rate(recipe, at, steps, batch)
        remarks.append(
            f"recipe {recipe.name!r}: the best rate lies between {best.low:.3g} and"
            f" {best.high:.3g} with 90 % at {best.configuration}."
        )
        remarks += best.notes
    return ByRecipe(
        recipe=recipe,
        law=source.law,
        lr=base_lr(recipe, at),
        reference=source.reference,
        batch=source.batch,
        steps=steps,
        by_steps=by_steps,
        others=other_rates_on(recipe, survey),
        remarks=tuple(remarks),
    )


def _settings_in_force(
    recipe: Recipe,
    survey: Survey,
    native: type,
    settings: Settings,
    groups: Iterable[UserGroup],
) -> Settings:
    """Return those of the recipe's settings that the factors train with."""
    base = {**defaults_of(native), **settings}
    names = [name for name in recipe.settings if name in base.keys() - SAME_UPDATES]
    factors = {f.name for f in survey.factors}
    own = [g.options for g in groups if not factors.isdisjoint(g.names)]
    return settings_of([{**base, **options} for options in own or [{}]], names)


def _differing(source: ByRecipe, native: type, settings: Settings) -> str:
    """Return how the run differs from the recipe's trials, and what to do about it; "" if it does
    not.
    """
    recipe = source.recipe
    trials, run = plain_value(recipe.settings), dict(settings)
    if not is_for(recipe, native):
        theirs, ours = recipe.optimizer.rpartition(".")[2], native.__name__
        trials = {"optimizer": theirs, "family": known_optimizer(theirs)[1].family}
        run = {"optimizer": ours, "family": optimizer_family(native, settings)}
        cure = f"Its rates are for {theirs} and not for {ours}: calibrate with {ours}."
    elif differences(trials, run):
        cure = "Its rates belong to these settings: give **recipe.settings."
    else:
        cure = "Its rates belong to these settings, and are less certain for others."
    for name in ("batch", "steps"):
        tried, now = getattr(recipe, name), getattr(source, name)
        if tried is not None and now is not None:
            trials[name], run[name] = tried, now
    words = differences(trials, run)
    return f"Recipe {recipe.name!r} was made with {words}. {cure}" if words else ""
