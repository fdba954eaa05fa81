"""This module checks whether a recipe was made for the model on which it is used.

If the recipe was made for a model with different layers, the recipe's 90 % interval becomes wider.
If the widths of the recipe's model and of the new model differ by more than a factor of 2, an error
is raised.
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

# How much the best learning rates of two tasks differ, as a standard deviation in octaves, for
# each init: benchmarks/answers.md (another_task.md)
ANOTHER_TASK_SD = {"A": 1.3, "B": 2.4}
# Widths that differ by more than this factor belong to different models. When recipes of the
# study's small networks were used for published language models, the learning rates were 1.7
# octaves too high, and the 90 % intervals contained only 31 % of the best learning rates:
# benchmarks/answers.md (suggestion.md at d1bec0f0)
SAME_WIDTH = 2.0
_PEFT = ".base_model.model."  # PEFT inserts this path in front of the names of a model's layers


def layers_of(survey: Survey) -> dict[str, float]:
    """Return a dictionary from patterns of layer names to the mean fan-in of the matching trained
    layers.

    A layer with two LoRA matrices is counted only once.
    """
    widths: dict[str, dict[str, float]] = {}
    for factor in survey.factors:
        of_pattern = widths.setdefault(name_pattern(factor.layer), {})
        of_pattern[factor.layer] = factor.fan_in
    return {pattern: fmean(each.values()) for pattern, each in widths.items()}


def check_width(recipe: Recipe, at: Reference) -> None:
    """Raise an error if the width of a configuration shows that it belongs to a different model.

    For full finetuning, the function only compares the widths if the recipe does not list the
    layers of its model. LoRA adapters may leave out the widest layers of a model, so the largest
    width of the adapted layers may be wrong for the full model. If the recipe lists the layers,
    `widened_for` compares the layers instead.
    """
    own = recipe.reference
    full = None if recipe.layers else recipe.full_fan_in
    known = {"full": full, own.method: own.fan_in}
    _check_same_width(recipe, at.fan_in, known.get(at.method))


def widened_for(recipe: Recipe, survey: Survey) -> tuple[Recipe, str]:
    """Return the recipe for use on a new model, and a warning if the two models differ.

    A recipe contains the names of the adapted layers of its model. If these layers are different
    from the layers of the new model, the best learning rate is less certain, and the returned
    recipe has a wider interval. If the recipe contains no layer names, the function only compares
    the width of the recipe's model with the width of the new model.

    Raises:
        RecipeError: the model is more than twice as wide or less than half as wide as the
            recipe's model.
    """
    here = layers_of(survey)
    own = recipe.reference
    pairs = [pair for pair in product(here, recipe.layers) if is_same_layer(*pair)]
    ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())
    if pairs:  # compare the widths of the layers that both models have
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
    # Only the base learning rate becomes less certain. Its variance is the first entry.
    wider = recipe.covariance + np.diag([sd**2, 0.0, 0.0])
    sentence = (
        f"Recipe {recipe.name!r} was made for a model with different layers. For example, only one"
        f" of the two models has {min(unmatched)}. The recipe's 90 % interval is therefore made"
        " wider, as for a different task. The best learning rates of two tasks typically differ by"
        f" a factor of {2.0**sd:.2g} (one standard deviation). Run ra.calibrate on this"
        " model, or use ra.suggest_lr instead of the recipe."
    )
    return replace(recipe, covariance=wider), sentence


def is_same_layer(layer: str, other: str) -> bool:
    """Return whether two name patterns describe the same layer, even if one model is wrapped.

    A wrapper, such as a PeftModel or a LightningModule, adds a prefix to the names of layers. Two
    name patterns therefore match if one of them ends with the other.
    """
    one, two = (f".{name}".replace(_PEFT, ".") for name in (layer, other))
    return one.endswith(two) or two.endswith(one)


def _check_same_width(
    recipe: Recipe, width: float | None, own_width: float | None
) -> None:
    """Raise an error if two widths differ by more than the factor `SAME_WIDTH`."""
    if not width or not own_width:  # an unknown width cannot be compared
        return
    if abs(math.log2(width / own_width)) <= math.log2(SAME_WIDTH):
        return
    name = recipe.name
    raise RecipeError(
        f"Recipe {name!r} was made for a model with fan-in {own_width:.4g}, but this model has"
        f" fan-in {width:.4g}. A recipe can only be used if the two widths differ by at most a"
        f" factor of {SAME_WIDTH:g}.",
        "Run ra.calibrate on this model, or use ra.suggest_lr (in a shell: rankaware suggest)."
        " To convert the recipe's learning rate anyway, pass lr=recipe.lr and"
        " tuned_at=recipe.reference to the optimizer.",
    )
