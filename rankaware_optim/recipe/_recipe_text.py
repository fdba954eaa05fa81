"""A recipe as text, for printing, `rankaware show` and its page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import fill
from typing import Any

from .._printing import printable
from .._types import Reference, Scaling, init_text
from ..laws import Power, law_sentence
from ._recipe_data import BASE, RecipeData
from ._uncertainty import own_band

_ALPHA: Mapping[Scaling, str] = {
    "fixed": "alpha follows rank (s fixed)",
    "rslora": "alpha fixed under rsLoRA (s falls as 1/√rank)",
    "alpha": "alpha fixed (s falls as 1/rank)",
    "as swept": "as in the sweep, which does not give it",
    "unknown": "no rule known: give alpha",
}


def lead(recipe: RecipeData) -> str:
    """Return the recipe in a sentence: optimizer, steps, batch and the configurations tried."""
    optimizer, steps, batch = (
        recipe.optimizer.rpartition(".")[2],
        recipe.steps or "unknown",
        _number(recipe.batch),
    )
    return (
        f"{optimizer}, {steps} steps at batch {batch}, calibrated at {_tried(recipe)}."
    )


def facts(recipe: RecipeData) -> Iterator[tuple[str, str]]:
    """Yield a recipe's facts as pairs of a name and a text."""
    at, horizon = recipe.reference, recipe.horizon
    warmup = "unknown" if recipe.warmup is None else f"{100 * recipe.warmup:.3g}%"
    settings = ", ".join(
        f"{name} {_setting(value)}" for name, value in recipe.settings.items()
    )
    yield (
        "base rate",
        f"{recipe.lr:.3g} at {_words(recipe, at)}, width {_number(at.fan_in)}",
    )
    yield (
        "fitted optimum",
        f"{recipe.fitted_lr:.3g}, {recipe.lean:.2g} octaves above the base rate, the one to use",
    )
    yield "90 % band", "{:.3g} to {:.3g}".format(*own_band(recipe))
    moved = "the smallest rate that diverged, moved to the base rate's configuration"
    yield (
        "ceiling",
        "none seen" if recipe.ceiling is None else f"{recipe.ceiling:.3g}, {moved}",
    )
    yield (
        "largest fan-in",
        f"{_number(recipe.full_fan_in)}, which full finetuning's rate depends on",
    )
    yield "law", _law(recipe.law)
    yield "alpha by rank", _ALPHA[recipe.scaling_rule]
    yield (
        "optimizer",
        f"{recipe.optimizer} with {settings}" if settings else recipe.optimizer,
    )
    yield (
        "horizon",
        f"{recipe.steps or 'unknown'} steps, batch {_number(recipe.batch)}, warm-up {warmup}",
    )
    yield (
        "other steps",
        f"{horizon.slope:+.2f} ± {horizon.slope_sd:.2f} octaves of rate per octave of steps",
    )
    yield "seen", f"{_tried(recipe)}; {_trials(recipe)}, from seed {recipe.seed}"
    yield "other rates", _other_rates(recipe)
    yield (
        "code",
        ", ".join(f"{name} {value}" for name, value in recipe.source.items())
        or "unknown",
    )
    yield (
        "versions",
        ", ".join(f"{name} {version}" for name, version in recipe.versions.items())
        or "unknown",
    )
    yield "hash", recipe.tag.partition(" ")[0]
    yield from (("note", note) for note in recipe.notes)


def missing_trials(recipe: RecipeData) -> str:
    """Return a sentence if the trials' file was missing when the recipe was read, else ""."""
    if not recipe.missing:
        return ""
    return (
        f"The trials of this recipe are not here: {printable(recipe.missing)} is missing beside its"
        " TOML file."
    )


def explain(recipe: RecipeData) -> str:
    """Return the facts, one per line."""
    lines = [
        fill(f"{name:<16}{text}", 100, subsequent_indent=" " * 16)
        for name, text in facts(recipe)
    ]
    return printable("\n".join([f"Recipe {recipe.name!r}", *lines]))


def configuration(
    recipe: RecipeData, target: Reference, steps: int | None, batch: float | None
) -> str:
    """Return the configuration of a rate at `target` in words. Steps and batch are by default the
    recipe's own.
    """
    numbers = (
        ("fan-in {:g}", target.fan_in),
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


def _words(recipe: RecipeData, target: Reference) -> str:
    """Return a reference as text, without the alpha of a sweep that does not give it."""
    swept = target.method == "lora" and recipe.scaling_rule == "as swept"
    return (
        f"rank {target.rank}, alpha as swept, {init_text(target.init)}"
        if swept
        else str(target)
    )


def _law(law: Power) -> str:
    """The law that rates move by, and how the trials corrected it."""
    corrections = [f"times rank^{law.exponent:.3g}"] if law.exponent else []
    corrections += (
        [f"times {law.full_factor:.3g} in full finetuning"]
        if law.full_factor != 1.0
        else []
    )
    return ", ".join([law_sentence(law.law), *corrections])


def _trials(recipe: RecipeData) -> str:
    if recipe.missing:
        return f"its trials are not here, {recipe.missing} is missing"
    return f"{len(recipe.tensors.get('lr', ()))} trials"


def _setting(value: Any) -> str:
    return (
        f"({', '.join(map(_setting, value))})"
        if isinstance(value, (list, tuple))
        else str(value)
    )


def _tried(recipe: RecipeData) -> str:
    ranks = f"ranks {', '.join(map(str, recipe.ranks))}" if recipe.ranks else ""
    return (
        " and ".join(
            filter(None, (ranks, "full finetuning" if recipe.full_seen else ""))
        )
        or "nothing"
    )


def _other_rates(recipe: RecipeData) -> str:
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
