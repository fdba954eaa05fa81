"""A recipe as text, for printing, `rankaware show` and its page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .._printing import Table, give_or_take, printable, times
from .._types import Reference, Scaling, init_text
from ..fitting import steps_variance
from ..laws import Power, law_sentence
from ._other_rates import BASE
from ._uncertainty import own_band

if TYPE_CHECKING:
    from ._recipe import Recipe

_ALPHA: Mapping[Scaling, str] = {
    "fixed": "alpha follows rank (s fixed)",
    "rslora": "alpha fixed under rsLoRA (s falls as 1/√rank)",
    "alpha": "alpha fixed (s falls as 1/rank)",
    "as swept": "as in the sweep, which does not give it",
    "unknown": "no rule known: give alpha",
}


def lead(recipe: Recipe) -> str:
    """Return the recipe in a sentence: optimizer, steps, batch and the configurations tried."""
    optimizer = recipe.optimizer.rpartition(".")[2]
    at = f"{recipe.steps or 'unknown'} steps at batch {_number(recipe.batch)}"
    return f"{optimizer}, {at}, calibrated at {_tried(recipe)}."


def facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Return a recipe's facts as pairs of a name and a text."""
    at, twice = recipe.reference, math.sqrt(steps_variance(1.0))
    ceiling = "none seen"
    if recipe.ceiling is not None:
        ceiling = (
            f"{recipe.ceiling:.3g}, the smallest rate that diverged, moved to the base rate's"
            " configuration"
        )
    settings = _listed(recipe.settings)
    warmup = "unknown" if recipe.warmup is None else f"{100 * recipe.warmup:.3g}%"
    batch = _number(recipe.batch)
    low, high = own_band(recipe)
    return [
        (
            "base rate",
            f"{recipe.lr:.3g} at {_words(recipe, at)}, mean fan-in {_fan_in(at.fan_in)}",
        ),
        (
            "fitted optimum",
            f"{recipe.fitted_lr:.3g}; {times(-recipe.lean)} is the base rate, the one to use",
        ),
        ("90 % band", f"{low:.3g} to {high:.3g}"),
        ("ceiling", ceiling),
        (
            "largest fan-in",
            f"{_fan_in(recipe.full_fan_in)}, which full finetuning's rate depends on",
        ),
        ("law", _law(recipe.law)),
        ("alpha by rank", _ALPHA[recipe.scaling_rule]),
        ("optimizer", " with ".join(filter(None, (recipe.optimizer, settings)))),
        (
            "horizon",
            f"{recipe.steps or 'unknown'} steps, batch {batch}, warm-up {warmup}",
        ),
        (
            "other steps",
            f"the same rate, {give_or_take(twice)} for twice the steps",
        ),
        ("seen", f"{_tried(recipe)}; {_trials(recipe)}, from seed {recipe.seed}"),
        ("other rates", _other_rates(recipe)),
        ("code", _listed(recipe.source).removeprefix("train ") or "unknown"),
        ("versions", _listed(recipe.versions) or "unknown"),
        ("hash", recipe.tag.partition(" ")[0]),
        *(("note", note) for note in recipe.notes),
    ]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_setting(value)}" for name, value in values.items())


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
    table = table_of(recipe)
    lines = [
        fill(f"{name:<16}{text}", 100, subsequent_indent=" " * 16)
        for name, text in table.rows
    ]
    return printable("\n".join([table.title, *lines]))


def configuration(
    recipe: Recipe, target: Reference, steps: int | None, batch: float | None
) -> str:
    """Return the configuration of a rate at `target` in words. Steps and batch are by default the
    recipe's own.
    """
    numbers = (
        ("fan-in {}", target.fan_in and _fan_in(target.fan_in)),
        ("{} steps", steps or recipe.steps),
        ("batch {:g}", batch or recipe.batch),
    )
    known = (words.format(value) for words, value in numbers if value is not None)
    return ", ".join([_words(recipe, target), *known])


def to_settle(width: float) -> str:
    """Return what full runs would settle, where none was made. width: ratio of the band's end to
    its middle.
    """
    return (
        f"the best rate of full finetuning is known within a factor of {width:.2g} to either side:"
        " three full runs (calibrate with full_trials=3) would settle it"
    )


def _words(recipe: Recipe, target: Reference) -> str:
    """Return a reference as text, without the alpha of a sweep that does not give it."""
    swept = target.method == "lora" and recipe.scaling_rule == "as swept"
    return (
        f"rank {target.rank}, alpha as swept, {init_text(target.init)}"
        if swept
        else str(target)
    )


def _law(law: Power) -> str:
    """The law that rates move by, and how the trials corrected it."""
    parts = [law_sentence(law.law)]
    if law.exponent:
        parts.append(f"times rank^{law.exponent:.3g}")
    if law.full_factor != 1.0:
        parts.append(f"times {law.full_factor:.3g} in full finetuning")
    return ", ".join(parts)


def _trials(recipe: Recipe) -> str:
    if recipe.missing:
        return f"its trials are not here, {recipe.missing} is missing"
    return f"{len(recipe.tensors.get('lr', ()))} trials"


def _setting(value: Any) -> str:
    return (
        f"({', '.join(map(_setting, value))})"
        if isinstance(value, (list, tuple))
        else str(value)
    )


def _tried(recipe: Recipe) -> str:
    ranks = f"ranks {', '.join(map(str, recipe.ranks))}" if recipe.ranks else ""
    full = "full finetuning" if recipe.full_seen else ""
    return " and ".join(filter(None, (ranks, full))) or "nothing"


def _other_rates(recipe: Recipe) -> str:
    """Return the rates of the parameters that are not factors, in words. Those that the trials
    trained come first.
    """
    seen = (
        f"{name} {'the base rate' if rate == BASE else f'{rate:.3g}'}"
        for name, rate in recipe.other_rates.items()
    )
    rest = (
        "that of full finetuning"
        if recipe.full_seen
        else "must be given, as full finetuning was not tried"
    )
    return "; ".join([*seen, f"any other {rest}"]) if recipe.other_rates else rest


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def _fan_in(value: float | None) -> str:
    """Return a width as text, a mean as a whole number."""
    return _number(value if value is None else round(value))
