"""A recipe and the run that uses it: whether they agree, and the recipe's rates for the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .._optimizers import known_optimizer, optimizer_family
from .._types import Survey
from .._warn import warn
from ..recipe import OtherRates, Recipe, differences, is_for, other_rates_on, plain_value, rate_on


class Run(NamedTuple):
    """A run that uses a recipe: the optimizer, its effective settings, and batch, steps and warm-up
    if given.
    """

    optimizer: type
    settings: Mapping[str, Any]
    batch: float | None = None
    steps: int | None = None
    warmup_share: float | None = None


class RecipeUse(NamedTuple):
    """A recipe in a run: notes, the factor of every rate for the run's steps, and the rates of
    other parameters.
    """

    notes: tuple[str, ...]
    by_steps: float
    others: OtherRates


def use_recipe(recipe: Recipe, survey: Survey, run: Run) -> RecipeUse:
    """Move the recipe's rates to the run's steps. Warn once if the run differs from the recipe's
    trials.
    """
    batch = None if recipe.batch is None else run.batch
    rate, by_steps = rate_on(recipe, survey, run.steps, batch), 1.0
    if run.steps is not None:
        by_steps = rate_on(recipe, survey, run.steps).lr / rate_on(recipe, survey).lr
    differ, notes = _differing(recipe, run), []
    if differ:
        notes.append(differ)
        warn(differ)
    if is_for(recipe, run.optimizer):
        steps, at_batch = run.steps or recipe.steps or "unknown", batch or recipe.batch or "unknown"
        band = (
            f"recipe {recipe.name!r}: the best rate lies between {rate.low:.3g} and {rate.high:.3g}"
            " with 90 %"
        )
        notes += [f"{band}, for {steps} steps at batch {at_batch}.", *rate.notes]
    return RecipeUse(tuple(notes), by_steps, other_rates_on(recipe, survey))


def _differing(recipe: Recipe, run: Run) -> str:
    """Return in words how the run differs from the recipe's trials, and what to do about it; "" if
    it does not.
    """
    own, other = recipe.optimizer.rpartition(".")[2], run.optimizer.__name__
    made: dict[str, Any] = {name: plain_value(value) for name, value in recipe.settings.items()}
    here: dict[str, Any] = dict(run.settings)
    if not is_for(recipe, run.optimizer):
        made = {"optimizer": own, "family": known_optimizer(own)[1].family}
        here = {"optimizer": other, "family": optimizer_family(run.optimizer, run.settings)}
        cure = f"Its rates are for {own} and not for {other}: calibrate with {other}."
    elif differences(made, here):
        cure = "Its rates belong to these settings: apply_settings=True uses them."
    else:
        cure = "Its rates belong to these settings, and are less certain for others."
    for name, was, now in (
        ("batch", recipe.batch, run.batch),
        ("steps", recipe.steps, run.steps),
        ("warmup_share", recipe.warmup, run.warmup_share),
    ):
        if was is not None and now is not None:
            made[name], here[name] = was, now
    words = differences(made, here)
    return f"Recipe {recipe.name!r} was made with {words}. {cure}" if words else ""
