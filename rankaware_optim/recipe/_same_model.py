"""Is a model the one that a recipe was made on? On another model the recipe's 90 % interval is
wider, and a model of another width raises an error.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from .._types import Reference, width_for
from ..errors import RecipeError
from ..inspection import Survey
from ._rates import name_pattern

if TYPE_CHECKING:
    from ._recipe import Recipe

# Octaves, by init: standard deviation of the best learning rate if another task is assumed to have
# the same one: benchmarks/answers.md (another_task.md)
ANOTHER_TASK_SD = {"A": 1.3, "B": 2.4}
# Widths that differ by more than this factor belong to different models. On published language
# models, recipes of the study's small networks gave learning rates 1.7 octaves too high, and their
# 90 % intervals contained 31 % of the best ones: benchmarks/answers.md (suggestion.md at d1bec0f0)
SAME_WIDTH = 2.0
_PEFT = ".base_model.model."  # the path under which PEFT puts a model


def layers_of(survey: Survey) -> dict[str, float]:
    """Return the mean fan-in of the layers that train, by name pattern.

    A layer counts once, although both its A and its B train.
    """
    widths: dict[str, dict[str, float]] = {}
    for factor in survey.factors:
        of_pattern = widths.setdefault(name_pattern(factor.layer), {})
        of_pattern[factor.layer] = factor.fan_in
    return {pattern: fmean(each.values()) for pattern, each in widths.items()}


def check_width(recipe: Recipe, at: Reference) -> None:
    """Raise an error if a configuration has the width of another model than the recipe's.

    Adapters may leave out a model's widest layers. So the largest width of the adapted layers tells
    little about full finetuning of the model, and it is not compared if the recipe knows layers by
    name: `widened_for` then compares the layers themselves.
    """
    own = recipe.reference
    full = None if recipe.layers else recipe.full_fan_in
    known = {"full": full, own.method: own.fan_in}
    _check_same_width(recipe, at.fan_in, known.get(at.method))


def widened_for(recipe: Recipe, survey: Survey) -> tuple[Recipe, str]:
    """Return the recipe as it applies to a model, and a sentence if that is not its own model.

    A recipe lists the names of its model's adapted layers. On a model with
    other layers the best learning rate is less certain, so the interval is wider. A recipe that
    lists no layers can only compare the width.

    Raises:
        RecipeError: the model is more than twice as wide or as narrow as the recipe's.
    """
    here = layers_of(survey)
    own = recipe.reference
    pairs = [pair for pair in product(here, recipe.layers) if is_same_layer(*pair)]
    ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())
    if pairs:  # compare the widths of the layers that both have
        width = fmean(map(here.__getitem__, ours))
        own_width = fmean(map(recipe.layers.__getitem__, theirs))
        _check_same_width(recipe, width, own_width)
    else:
        width = width_for(survey, own.method, own.init)
        _check_same_width(recipe, width, own.fan_in)
    unmatched = {*here}.difference(ours) | {*recipe.layers}.difference(theirs)
    is_full = "full" in (own.method, survey.dominant().method)
    if pairs and is_full:
        # Full finetuning trains more layers than an adapter does, so one common layer is enough.
        return recipe, ""
    if not (unmatched and here and recipe.layers):
        return recipe, ""
    sd = ANOTHER_TASK_SD[own.init]
    wider = recipe.covariance + np.diag([sd**2, 0.0, 0.0])
    sentence = (
        f"Recipe {recipe.name!r} was made on a model with other layers (only one of the two models"
        f" has {min(unmatched)}), so this counts as another task. There the best learning rate"
        f" differs from the recipe's by a factor of {2.0**sd:.2g} (one standard deviation)."
        " Calibrate on this model, or start from suggest_lr."
    )
    return replace(recipe, covariance=wider), sentence


def is_same_layer(layer: str, other: str) -> bool:
    """Return whether two name patterns mean one layer. Either model may be inside a wrapper, such
    as PEFT's or a LightningModule, which puts its own path in front of the name.
    """
    one, two = (f".{name}".replace(_PEFT, ".") for name in (layer, other))
    return one.endswith(two) or two.endswith(one)


def _check_same_width(
    recipe: Recipe, width: float | None, own_width: float | None
) -> None:
    if not width or not own_width:
        return
    if abs(math.log2(width / own_width)) <= math.log2(SAME_WIDTH):
        return
    raise RecipeError(
        f"Recipe {recipe.name!r} was made at fan-in {own_width:.4g}. A model with fan-in"
        f" {width:.4g} is another model, so neither the recipe's learning rate nor its 90 %"
        " interval applies.",
        "Calibrate on that model, or start from suggest_lr (in a shell, rankaware suggest). To"
        " convert the learning rate by the scaling law all the same, pass lr=recipe.lr and"
        " tuned_at=recipe.reference to the optimizer, or from_=recipe.reference to convert_lr.",
    )
