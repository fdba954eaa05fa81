"""This module describes a recipe in words, which `Recipe.explain`, notebooks and reports show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .._types import Scaling
from ..fitting import end_note
from ..laws import Power, law_sentence
from ._rates import rate
from ._trials import observations_of

if TYPE_CHECKING:
    from ._recipe import Recipe

_ALPHA: Mapping[Scaling, str] = {
    "fixed": "alpha is proportional to the rank (fixed scaling)",
    "rslora": "alpha is fixed under rsLoRA (scaling falls with the root of the rank)",
    "alpha": "alpha is fixed (scaling falls as 1/rank)",
    "unknown": "unknown: pass alpha with every rank",
}


def facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the rows of a table that describes a recipe. Each row contains a name and a value."""
    at = recipe.reference
    warmup = "unknown" if recipe.warmup is None else f"{100 * recipe.warmup:.3g}%"
    steps = _number(recipe.steps)
    batch = _number(recipe.batch)
    rows = {
        "base rate": f"{recipe.lr:.3g} at {at}, mean fan-in {_number(at.fan_in)}",
        "fitted optimum": f"{recipe.fitted_lr:.3g}; use the base rate, which has a safety margin"
        f" (× {2.0**-recipe.margin:.3g})",
        "90 % interval": rate(recipe, at).band,
        "ceiling": _ceiling(recipe),
        "largest fan-in": f"{_number(recipe.full_fan_in)} (full finetuning's learning rate depends"
        " on it)",
        "law": _law(recipe.law),
        "alpha by rank": _ALPHA[recipe.scaling_rule],
        "optimizer": _optimizer(recipe),
        "runs": f"{steps} steps, batch {batch}, warm-up {warmup}",
        "tried": _tried(recipe),
        "other rates": _other_rates(recipe),
        "source": _listed(recipe.source).removeprefix("train ") or "unknown",
        "versions": _listed(recipe.versions) or "unknown",
        "hash": recipe.tag.partition(" ")[0],
    }
    # The fit adds a note about the end of the range only for the rank that it searched.
    # Here every rank is checked, and dict.fromkeys drops the notes that are then repeated.
    notes = dict.fromkeys((*recipe.notes, *_notes_on_ends(recipe)))
    return [*rows.items(), *(("note", note) for note in notes)]


def _notes_on_ends(recipe: Recipe) -> Iterator[str]:
    """Yield a note for each rank whose best learning rate is the lowest or highest one that was
    tried.

    For such a rank, the best learning rate may be outside the range that was tried.
    """
    tried = observations_of(recipe)
    for rank in (*recipe.ranks, None):  # None is full finetuning
        if note := end_note(tried, rank):
            yield note


def trials_text(recipe: Recipe) -> str:
    """Describe how many trials a recipe has, or say that its trials file is missing."""
    if recipe.missing:
        return (
            f"its trials were not loaded, because the file {recipe.missing} is missing"
        )
    return f"{len(recipe.tensors.get('lr', ()))} trials"


def _ceiling(recipe: Recipe) -> str:
    if recipe.ceiling is None:
        return "none seen"
    return (
        f"{recipe.ceiling:.3g}, the smallest learning rate that diverged, converted by the scaling"
        " law to the configuration of the base rate"
    )


def _law(law: Power) -> str:
    """Describe the scaling law of a recipe and the corrections that were fitted to its trials."""
    words = law_sentence(law.law)
    if law.exponent:
        words += f", times rank^{law.exponent:.3g}"
    if law.full_factor != 1.0:
        words += f", times {law.full_factor:.3g} in full finetuning"
    return words


def _optimizer(recipe: Recipe) -> str:
    if not recipe.settings:
        return recipe.optimizer
    return f"{recipe.optimizer} with {_listed(recipe.settings)}"


def _tried(recipe: Recipe) -> str:
    tried = f"ranks {', '.join(map(str, recipe.ranks)) or 'none'}"
    if recipe.full_seen:
        tried += " and full finetuning"
    return f"{tried}; {trials_text(recipe)}"


def _other_rates(recipe: Recipe) -> str:
    """Describe the learning rates of all parameters that are not LoRA matrices."""
    # Parameters without a recorded learning rate train all of their weights, as in full finetuning.
    rest = "must be passed, because full finetuning was not tried"
    if recipe.full_seen:
        rest = "full finetuning's learning rate"
    if not recipe.other_rates:
        return rest
    return f"{_listed(recipe.other_rates)}; any other: {rest}"


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{round(value)}"
