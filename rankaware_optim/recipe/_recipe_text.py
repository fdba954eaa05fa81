"""A recipe as text, for printing, `rankaware show` and its page."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .._printing import Table, printable, times
from .._types import Reference, Scaling
from ..laws import Power, law_sentence
from ._constants import BASE
from ._uncertainty import own_band

if TYPE_CHECKING:
    from ._recipe import Recipe

_ALPHA: Mapping[Scaling, str] = {
    "fixed": "alpha follows rank (scaling fixed)",
    "rslora": "alpha kept under rsLoRA (scaling falls as 1/√rank)",
    "alpha": "alpha kept (scaling falls as 1/rank)",
    "unknown": "no rule known: give alpha",
}
_COLUMN = 16  # characters of a fact's name


def lead(recipe: Recipe) -> str:
    """Return the recipe in a sentence: optimizer, steps, batch and the configurations tried."""
    optimizer = recipe.optimizer.rpartition(".")[2]
    steps, batch = _number(recipe.steps), _number(recipe.batch)
    tried = _tried(recipe)
    return f"{optimizer}, {steps} steps at batch {batch}, calibrated at {tried}."


def facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Return a recipe's facts as pairs of a name and a text."""
    at = recipe.reference
    low, high = own_band(recipe)
    ceiling = "none seen"
    if recipe.ceiling is not None:
        ceiling = (
            f"{recipe.ceiling:.3g}, the smallest rate that diverged, moved to the base rate's"
            " configuration as a best rate"
        )
    optimizer = recipe.optimizer
    if recipe.settings:
        optimizer += f" with {_listed(recipe.settings)}"
    warmup = "unknown" if recipe.warmup is None else f"{100 * recipe.warmup:.3g}%"
    steps, batch = _number(recipe.steps), _number(recipe.batch)
    rows = {
        "base rate": f"{recipe.lr:.3g} at {at}, mean fan-in {_fan_in(at.fan_in)}",
        "fitted optimum": f"{recipe.fitted_lr:.3g}; the base rate, the one to use, is a margin of"
        f" {times(-recipe.margin)} below",
        "90 % band": f"{low:.3g} to {high:.3g}",
        "ceiling": ceiling,
        "largest fan-in": f"{_fan_in(recipe.full_fan_in)}, which full finetuning's rate depends on",
        "law": _law(recipe.law),
        "alpha by rank": _ALPHA[recipe.scaling_rule],
        "optimizer": optimizer,
        "horizon": f"{steps} steps, batch {batch}, warm-up {warmup}",
        "seen": f"{_tried(recipe)}; {_trials(recipe)}, from seed {recipe.seed}",
        "other rates": _other_rates(recipe),
        "code": _listed(recipe.source).removeprefix("train ") or "unknown",
        "versions": _listed(recipe.versions) or "unknown",
        "hash": recipe.tag.partition(" ")[0],
    }
    return [*rows.items(), *(("note", note) for note in recipe.notes)]


def missing_trials(recipe: Recipe) -> str:
    """Return a sentence if the trials' file was missing when the recipe was read, else ""."""
    if not recipe.missing:
        return ""
    return (
        f"The trials of this recipe are not here: {printable(recipe.missing)} is missing beside its"
        " TOML file."
    )


def table_of(recipe: Recipe) -> Table:
    """Return the facts, one per row."""
    return Table((), facts(recipe), title=f"Recipe {recipe.name!r}")


def explain(recipe: Recipe) -> str:
    """Return the facts, one per line."""
    table, indent = table_of(recipe), " " * _COLUMN
    lines = [table.title]
    for name, text in table.rows:
        lines.append(fill(name.ljust(_COLUMN) + text, 100, subsequent_indent=indent))
    return printable("\n".join(lines))


def configuration_text(
    recipe: Recipe, at: Reference, steps: int | None, batch: float | None
) -> str:
    """Return the configuration of a rate in words. Steps and batch are by default the recipe's."""
    words = [str(at)]
    if at.fan_in is not None:
        words.append(f"fan-in {_fan_in(at.fan_in)}")
    steps, batch = steps or recipe.steps, batch or recipe.batch
    if steps is not None:
        words.append(f"{steps} steps")
    if batch is not None:
        words.append(f"batch {batch:g}")
    return ", ".join(words)


def _law(law: Power) -> str:
    """The law that rates move by, and how the trials corrected it."""
    words = law_sentence(law.law)
    if law.exponent:
        words += f", times rank^{law.exponent:.3g}"
    if law.full_factor != 1.0:
        words += f", times {law.full_factor:.3g} in full finetuning"
    return words


def _trials(recipe: Recipe) -> str:
    if recipe.missing:
        return f"its trials are not here, {recipe.missing} is missing"
    return f"{len(recipe.tensors.get('lr', ()))} trials"


def _tried(recipe: Recipe) -> str:
    ranks = f"ranks {', '.join(map(str, recipe.ranks))}" if recipe.ranks else ""
    full = "full finetuning" if recipe.full_seen else ""
    return " and ".join(filter(None, (ranks, full))) or "nothing"


def _other_rates(recipe: Recipe) -> str:
    """Return the rates of the parameters that are not factors, those that the trials trained
    first.
    """
    words = []
    for name, rate in recipe.other_rates.items():
        words.append(f"{name} {'the base rate' if rate == BASE else f'{rate:.3g}'}")
    rest = "must be given, as full finetuning was not tried"
    if recipe.full_seen:
        rest = "that of full finetuning"
    return "; ".join([*words, f"any other {rest}" if words else rest])


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.15g}"


def _fan_in(value: float | None) -> str:
    """Return a width as text, a mean as a whole number."""
    return _number(value if value is None else round(value))
