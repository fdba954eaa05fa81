"""Is this the model of a recipe's trials? On another one its band is wider, and another width is
refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import TypeVar

import numpy as np

from .._types import Reference, width_for
from ..errors import RecipeError
from ..inspection import Survey
from ._rates import name_pattern
from ._record import Record

AnyRecord = TypeVar("AnyRecord", bound=Record)
# Octaves, by init: standard deviation of the best rate that another task gives: another_task.md,
# frozen answers
ANOTHER_TASK_SD = {"A": 1.3, "B": 2.4}
# A width that differs by more than this factor is another model's, where even a band with that
# spread missed a third of the best rates with steps and batch given: suggestion.md
SAME_WIDTH = 2.0
_PEFT = ".base_model.model."  # where PEFT puts a model


def layers_of(survey: Survey) -> dict[str, float]:
    """Return the mean fan-in of the layers whose factors or weights train, by name pattern."""
    widths: dict[str, dict[str, float]] = {}
    for factor in survey.factors:
        of_pattern = widths.setdefault(name_pattern(factor.layer), {})
        of_pattern[factor.layer] = factor.fan_in
    return {pattern: fmean(each.values()) for pattern, each in widths.items()}


def check_width(recipe: Record, at: Reference) -> None:
    """Raise if the width of a configuration is that of another model than the recipe's.

    Adapters may leave out a model's widest layers, so a recipe that names its layers may be at home
    at a larger width of full finetuning.
    """
    own = recipe.reference
    full = None if recipe.layers else recipe.full_fan_in
    known = {"full": full, own.method: own.fan_in}
    _refuse_other_width(recipe, at.fan_in, known.get(at.method))


def widened_for(recipe: AnyRecord, survey: Survey) -> tuple[AnyRecord, str]:
    """Return the recipe as it is for a model, and a sentence if that is another than its own.

    On another model the best rate is less certain, so the band is wider. A recipe that names no
    layers knows only a width.

    Raises:
        RecipeError: the model's width is that of another model.
    """
    here = layers_of(survey)
    own = recipe.reference
    width = width_for(survey, own.method, own.init)
    own_width = own.fan_in
    pairs = [pair for pair in product(here, recipe.layers) if is_same_layer(*pair)]
    ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())
    if pairs:  # the widths are those of the layers that both have
        width = fmean(map(here.__getitem__, ours))
        own_width = fmean(map(recipe.layers.__getitem__, theirs))
    _refuse_other_width(recipe, width, own_width)
    alone = {*here}.difference(ours) | {*recipe.layers}.difference(theirs)
    if pairs and "full" in (own.method, survey.dominant().method):
        alone.clear()  # it trains more layers than an adapter: one that both have is enough
    if not (alone and here and recipe.layers):
        return recipe, ""
    sd = ANOTHER_TASK_SD[own.init]
    wider = recipe.covariance + np.diag([sd**2, 0.0, 0.0])
    sentence = (
        f"The layers of recipe {recipe.name!r} are not those of this model (only one of them has"
        f" {min(alone)}): it counts as another task, where the best rate is off by a factor of"
        f" {2.0**sd:.2g} (one standard deviation), so calibrate on this model, or start from"
        " suggest_lr."
    )
    return replace(recipe, covariance=wider), sentence


def is_same_layer(layer: str, other: str) -> bool:
    """Return whether two patterns name one layer, of which one may be in a wrapper."""
    one, two = (f".{name}".replace(_PEFT, ".") for name in (layer, other))
    return one.endswith(two) or two.endswith(one)


def _refuse_other_width(recipe: Record, width: float | None, own: float | None) -> None:
    if not width or not own or abs(math.log2(width / own)) <= math.log2(SAME_WIDTH):
        return
    raise RecipeError(
        f"Recipe {recipe.name!r} was made at fan-in {own:.4g}, and fan-in {width:.4g} is another"
        " model's, where neither its rate nor its band holds.",
        "Calibrate on that model, or start from suggest_lr (in a shell, rankaware suggest). To move"
        " the rate by the law all the same, give lr=recipe.lr and tuned_at=recipe.reference to the"
        " optimizer, or from_= to convert_lr.",
    )
