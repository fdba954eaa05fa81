"""A recipe in words: `facts`, for `explain`, notebooks and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .._printing import times
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
    """Return a recipe's facts as pairs of a name and a sentence or value."""
    at = recipe.reference
    warmup = "unknown" if recipe.warmup is None else f"{100 * recipe.warmup:.3g}%"
    steps = _number(recipe.steps)
    batch = _number(recipe.batch)
    rows = {
        "base rate": f"{recipe.lr:.3g} at {at}, mean fan-in {_number(at.fan_in)}",
        "fitted optimum": f"{recipe.fitted_lr:.3g}; use the base rate, which has a safety margin"
        f" ({times(-recipe.margin)})",
        "90 % interval": rate(recipe, at).band,
        "ceiling": _ceiling(recipe),
        "largest fan-in": f"{_number(recipe.full_fan_in)}, which full finetuning's learning rate"
        " depends on",
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
    # A fit notes the end of the range only for the rank that it searched, and each note once here.
    notes = dict.fromkeys((*recipe.notes, *_notes_on_ends(recipe)))
    return [*rows.items(), *(("note", note) for note in notes)]


def _notes_on_ends(recipe: Recipe) -> Iterator[str]:
    """Yield a note on each rank where the lowest or the highest learning rate tried was best."""
    tried = observations_of(recipe)
    for rank in (*recipe.ranks, None):
        if note := end_note(tried, rank):
            yield note


def trials_text(recipe: Recipe) -> str:
    """Return how many trials a recipe has, or that their file was missing when it was read."""
    if recipe.missing:
        return f"its trials are not here, because the file {recipe.missing} is missing"
    return f"{len(recipe.tensors.get('lr', ()))} trials"


def _ceiling(recipe: Recipe) -> str:
    if recipe.ceiling is None:
        return "none seen"
    return (
        f"{recipe.ceiling:.3g}, the smallest learning rate that diverged, converted to the base"
        " rate's configuration as if it were a best rate"
    )


def _law(law: Power) -> str:
    """Return the scaling law, and how the trials corrected it."""
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
    """Return the learning rates of the parameters that trained beside the LoRA matrices."""
    rest = "must be given, because full finetuning was not tried"
    if recipe.full_seen:
        rest = "full finetuning's learning rate"
    if not recipe.other_rates:
        return rest
    return f"{_listed(recipe.other_rates)}; any other: {rest}"


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{round(value)}"
