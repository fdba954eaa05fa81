"""The rates of a recipe: at a configuration, with its band, and of a model's other parameters."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from .._optimizers import known_optimizer
from .._printing import times
from .._rate import Rate
from .._types import (
    GAMMA,
    Method,
    Rated,
    Reference,
    Survey,
    scaling_factor,
    width_for,
)
from .._warn import warn
from ..errors import RankAwareError, RecipeError
from ..laws import checked_multiplier
from ._constants import ANY_WIDTH, BASE, Z90
from ._recipe_text import configuration_text
from ._uncertainty import by_batch, by_steps, margin, spread

if TYPE_CHECKING:
    from ._recipe import Recipe


def rate(
    recipe: Recipe,
    at: Reference,
    steps: int | None = None,
    batch: float | None = None,
) -> Rate:
    """Return the rate at a configuration. Its first notes say what was not tried.

    The best rate is fitted_lr · law(at) / law(reference), moved to the batch. The rate to use is
    `margin` octaves below it, and the band reaches 1.645 standard deviations to either side.

    Args:
        recipe: the recipe.
        at: the configuration. Without a fan-in it has the recipe's.
        steps: optimizer steps, by default the recipe's own.
        batch: batch size, by default the recipe's own.

    Raises:
        RecipeError: steps, batch or a fan-in is missing or impossible, or the rate would not be a
            positive finite number.
        LawError: the law has no usable multiplier there.
    """
    here, reference = _with_widths(recipe, at)
    longer, larger = by_steps(recipe, steps), by_batch(recipe, batch)
    sd, untried = spread(recipe, here)
    sd = math.sqrt(max(sd**2 + longer.variance + larger.variance, recipe.scatter**2))
    untried += filter(None, (longer.note, larger.note))
    try:
        moved = checked_multiplier(recipe.law, here.as_factor(), reference)
        moved *= 2.0**larger.octaves
        width = 2.0 ** (Z90 * sd)
    except OverflowError:
        moved = width = math.inf
    best, octaves = recipe.fitted_lr * moved, _margin(recipe, sd)
    law_alone = here.method == "full" and not recipe.full_seen
    notes = [*untried]
    if law_alone:
        notes.append(
            f"the best rate of full finetuning is known within a factor of {width:.2g} to either"
            " side: three full runs (calibrate with full_trials=3) would settle it"
        )
    if octaves:
        notes.append(
            f"a margin of {times(-octaves)} below the best, since too high costs more"
        )
    ceiling = None
    if recipe.ceiling is not None and not law_alone:
        ceiling = recipe.ceiling * moved
    low, high = best / width, best * width
    lr = best * 2.0**-octaves
    if not all(0 < edge < math.inf for edge in (lr, low, high, ceiling or lr)):
        raise RecipeError(
            f"Recipe {recipe.name!r} gives {here} a rate or a band that is not positive and"
            " finite.",
            "Ask for a configuration nearer to its own, or restore the recipe.",
        )
    return Rate(
        lr,
        low=low,
        high=high,
        ceiling=ceiling,
        extrapolated=bool(untried),
        notes=(*notes, *recipe.notes),
        configuration=configuration_text(recipe, at, steps, batch),
    )


def warn_of(recipe: Recipe, rate: Rate) -> None:
    """Warn if a rate is extrapolated."""
    if rate.extrapolated:
        warn(f"Recipe {recipe.name!r} extrapolates: {rate.notes[0]}.")


def base_lr(recipe: Recipe, at: Reference) -> float:
    """Return the base rate of a model at `at`: the best rate at the recipe's reference less the
    margin of the model's configuration.
    """
    sd, _ = spread(recipe, at)
    return float(recipe.fitted_lr * 2.0 ** -_margin(recipe, sd))


def _margin(recipe: Recipe, sd: float) -> float:
    """Return how far below the best rate to stay, octaves. sd: the rate's, octaves."""
    return margin(recipe.steepness, sd) if recipe.steepness else recipe.margin


def _with_widths(recipe: Recipe, at: Reference) -> tuple[Reference, Reference]:
    """Return a configuration and the recipe's reference, with a width if the reference has none."""
    own = recipe.reference
    if own.fan_in is not None:
        return at, own
    if at.fan_in is None and (at.method, at.init) != (own.method, own.init):
        raise RecipeError(
            f"Recipe {recipe.name!r} has no fan-in, and the rate for {at} depends on it.",
            "Give the model's width as fan_in.",
        )
    width = at.fan_in or ANY_WIDTH
    return replace(at, fan_in=width), replace(own, fan_in=width)


# --- configurations -------------------------------------------------------------------------------


def configuration(
    recipe: Recipe,
    rank: int | Literal["full"] | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    init: Literal["A", "B"] | None = None,
    method: Method = "lora",
    fan_in: float | None = None,
) -> Reference:
    """Return the arguments of `Recipe.at` as a reference. What is not given is the recipe's own."""
    if rank == "full":
        rank, method = None, "full"
    if method == "full":
        given = {"rank": rank, "alpha": alpha, "init": init, "rslora": rslora or None}
        for name, value in given.items():
            if value is not None:
                raise RecipeError(
                    f"{name} was given for full finetuning, which has none.",
                    "Leave it out.",
                    name,
                )
        width = recipe.full_fan_in or recipe.reference.fan_in
        at = Reference(method="full", init=recipe.reference.init, fan_in=width)
    else:
        at = _lora(recipe, rank, alpha, rslora, method)
    if init is not None:
        at = replace(at, init=init)
    return at if fan_in is None else replace(at, fan_in=fan_in)


def _lora(
    recipe: Recipe, rank: int | None, alpha: float | None, rslora: bool, method: Method
) -> Reference:
    """Return a rank and alpha at the recipe's init and width. Without alpha the scaling follows the
    rule of the trials.
    """
    own = recipe.reference
    rank = own.rank if rank is None else rank
    if rank is None:
        raise RecipeError(
            "This recipe was made by full finetuning alone.",
            "Give a rank and an alpha for LoRA.",
        )
    at = Reference(rank, alpha or 1.0, rslora, own.init, own.fan_in, method)
    if alpha is not None:
        return replace(at, alpha=alpha)
    if rslora:
        raise RecipeError("rslora was given without alpha.", "Give both.", "rslora")
    return replace(at, alpha=_scaling_at(recipe, rank) * rank)


def _scaling_at(recipe: Recipe, rank: int) -> float:
    """Return the scaling at a rank, by the rule of the trials."""
    own = recipe.reference
    if rank == own.rank:
        return own.scaling
    if recipe.scaling_rule not in GAMMA or own.rank is None:
        raise RecipeError(
            f"The trials of recipe {recipe.name!r} give no rule for alpha by rank.",
            "Give an alpha with the rank.",
        )
    return own.scaling * scaling_factor(recipe.scaling_rule, own.rank, rank)


def known_rate(
    recipe: Recipe, rank: int | None, alpha: float | None = None
) -> Rate | None:
    """Return the rate at a rank, or for full finetuning if it is None. No warning is given.

    Returns None if the recipe needs more arguments, such as alpha.
    """
    method: Method = "full" if rank is None else "lora"
    try:
        return rate(recipe, configuration(recipe, rank, alpha, method=method))
    except RankAwareError:
        return None


# --- a model --------------------------------------------------------------------------------------


def configuration_of(recipe: Recipe, survey: Survey) -> Reference:
    """Return a model's most common configuration, at its own width."""
    own = survey.dominant()
    init = own.init if own.method == "lora" else None
    width = width_for(survey, own.method, recipe.reference.init)
    return configuration(
        recipe, own.rank, own.alpha, init=init, method=own.method, fan_in=width
    )


def is_for(recipe: Recipe, optimizer: type) -> bool:
    """Return whether an optimizer is the recipe's, or its variant with a quantized state."""
    name = recipe.optimizer.rpartition(".")[2]
    known = known_optimizer(name)[0]
    return name == optimizer.__name__ or (
        known != "" and known == known_optimizer(optimizer)[0]
    )


# --- other parameters, such as heads and norms ----------------------------------------------------


def name_pattern(name: str) -> str:
    """Return a parameter's name with "*" for numbers, so that all layers share one pattern.

    >>> name_pattern("layers.11.norm1.weight")
    'layers.*.norm1.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


class OtherRates(NamedTuple):
    """A recipe's rates for a model's parameters that are not factors.

    full: the rate of full finetuning on this model, None if the recipe's trials did not include it.
    """

    recipe: Recipe
    full: float | None

    def rate(self, name: str, trains: bool = True) -> Rated | None:
        """Return the rate of a parameter: that of the trials, else that of full finetuning.

        Args:
            name: the parameter's name.
            trains: whether it has a gradient.

        Returns:
            The rate, or None if neither was tried and the parameter does not train.

        Raises:
            RecipeError: neither was tried, and the parameter trains.
        """
        tried = self.recipe.other_rates.get(name_pattern(name))
        if tried == BASE:
            return Rated(self.recipe.lr, "the base rate, as in the recipe's trials")
        if tried is not None:
            return Rated(float(tried), "its rate in the recipe's trials")
        if self.full is not None:
            return Rated(self.full, "full finetuning's rate by the recipe")
        if trains:
            raise RecipeError(
                f"The trials of recipe {self.recipe.name!r} trained neither {name} nor the full"
                " model, so it has no rate.",
                "Give other_lr=, or rates= for its name.",
            )
        return None


def other_rates_on(recipe: Recipe, survey: Survey) -> OtherRates:
    """Return a recipe's rates for a model's parameters that are not factors."""
    if not recipe.full_seen:
        return OtherRates(recipe, None)
    width = survey.full_width(recipe.reference.init)
    at = configuration(recipe, method="full", fan_in=width)
    return OtherRates(recipe, rate(recipe, at).lr)
