"""This module computes the learning rate that a recipe predicts for a given configuration.

The function `rate` uses the scaling law to convert the fitted learning rate to the configuration.
The safety margin and the 90 % interval depend on the uncertainty of the converted learning rate.
For a configuration that was tried, the uncertainty of the learning rate is the standard deviation
of the fit. For other configurations, for example for a rank above all tried ranks, the uncertainty
of the learning rate is larger.

(`optimizer/_rates.py` assigns learning rates to the parameter groups of an optimizer.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from .._checks import check_range, plain
from .._optimizers import known_optimizer
from .._printing import give_or_take
from .._rate import Rate
from .._types import Method, Reference, Scaling
from .._warn import warn
from ..errors import RecipeError
from ..fitting import Prior, steps_variance
from ..laws import (
    BFLOAT16,
    FULL_TRUST,
    beyond_batches,
    checked_batch_multiplier,
    checked_multiplier,
    from_full,
    is_measured,
    to_full,
)

if TYPE_CHECKING:
    from ._recipe import Recipe

# Each comment ends with the evidence for the constant: a page of benchmarks/results, a section of
# benchmarks/answers.md, or "judgement" if the value was chosen without a measurement.
Z90 = (
    1.645  # a normal 90 % interval reaches this many standard deviations to either side
)
# Additional uncertainty for configurations that were not tried, as standard deviations. The first
# three are octaves of learning rate per octave of rank, width and batch size. INIT_SD is in
# octaves, for the other init. They are rules of thumb from the scatter of published sweeps around
# the scaling law. Small sweeps over the batch size showed 0.3 to 0.67 octaves: judgement
RANK_SD = 0.1
WIDTH_SD = 0.25
BATCH_SD = 0.15
INIT_SD = 1.0
# Replaces RANK_SD for ranks below the tried ones when A starts at zero. There the best learning
# rate depends less on the rank than the trials suggest: benchmarks/answers.md
LOWER_RANK_SD = 0.2
# Used if full finetuning was not tried and the LoRA trials started with B = 0. The drift with rank
# is extrapolated up to full rank (r = n), and this fraction of it is added to the uncertainty:
# judgement
DRIFT_SHARE = 0.5
# The largest safety margin, in octaves. Larger margins gave no lower loss: benchmarks/answers.md
MOST_MARGIN = 0.25
_NO_MARGIN = 0.01  # octaves. A margin below 1 % is not worth a note: judgement
# The width that is used if no width is known. Its effect nearly cancels when a learning rate is
# converted between ranks with the same init: judgement
ANY_WIDTH = 4096.0
# LoRA's scaling depends on the rank r as s = c·r^(−γ). The table has γ for every scaling rule.
_GAMMA: dict[Scaling, float] = {"fixed": 0.0, "rslora": 0.5, "alpha": 1.0}


def rate(recipe: Recipe, at: Reference, steps: int | None = None) -> Rate:
    """Return the recipe's learning rate for a configuration, with its 90 % interval and notes.

    The best learning rate is fitted_lr · law(at) / law(reference), converted to the
    batch size. The learning rate to use is lower than the best learning rate by a
    safety margin. On a log scale, the 90 % interval extends 1.645 standard deviations
    to either side of the best learning rate. The notes in the result first list how the
    requested configuration differs from the recipe's trials.

    Args:
        recipe: the recipe.
        at: the configuration. If its fan-in or batch is None, the recipe's value is used.
        steps: optimizer steps, by default those of the recipe.

    Raises:
        RecipeError: steps, batch or a fan-in is missing or impossible, or the learning rate would
            not be a positive finite number.
        LawError: the scaling law returned an unusable multiplier for this configuration.
    """
    # The width of `at` may be unknown, but `here` always has one.
    here, reference = _with_widths(recipe, at)
    sd, notes = spread(recipe, here, steps)
    is_extrapolated = bool(notes)
    try:
        multiplier = law_multiplier(recipe, here, reference)
        multiplier *= _batch_multiplier(recipe, at)
        width = 2.0 ** (Z90 * sd)
    except OverflowError:  # the check below raises an error with a clear message
        multiplier = width = math.inf
    best = recipe.fitted_lr * multiplier
    # The margin is computed for this configuration. It grows with the uncertainty.
    octaves = margin(recipe, sd)
    if octaves > _NO_MARGIN:
        notes.append(
            f"the learning rate is {2.0**-octaves:.3g} times the best estimate, as a safety margin,"
            " because a learning rate that is too high costs more than one that is too low"
        )
    # A LoRA run that diverged tells nothing about full finetuning.
    ceiling = None
    if recipe.ceiling is not None and (at.method == "lora" or recipe.full_seen):
        ceiling = recipe.ceiling * multiplier
    low = best / width
    high = best * width
    lr = best * 2.0**-octaves
    if not all(0 < edge < math.inf for edge in (lr, low, high, ceiling or lr)):
        name, target, reference = recipe.name, here, recipe.reference
        raise RecipeError(
            f"Recipe {name!r} cannot be used for {target}, because the learning rate or an end of"
            " its interval would be zero or infinite.",
            f"Pass a configuration that is closer to the recipe's configuration ({reference}). If"
            " your configuration is already close, the recipe may be damaged: restore its file"
            " from a copy.",
        )
    return Rate(
        lr,
        low=low,
        high=high,
        ceiling=ceiling,
        extrapolated=is_extrapolated,
        notes=(*notes, *recipe.notes),
        configuration=_configuration_text(recipe, at, steps),
        reference=at,
    )


def warn_of(recipe: Recipe, rate: Rate) -> None:
    """Warn the user if a learning rate was extrapolated from the trials."""
    if rate.extrapolated:
        name, reason = recipe.name, rate.notes[0]
        warn(
            f"Recipe {name!r} extrapolates the learning rate, because its trials do not cover this"
            f" configuration: {reason}. The 90 % interval is therefore wider. For a narrower"
            " interval, run ra.calibrate with this configuration."
        )


def margin(recipe: Recipe, sd: float) -> float:
    """Return the safety margin, in octaves, for a given uncertainty of the best learning rate.

    The uncertainty `sd` is a standard deviation in octaves. The margin is a·sd²/2,
    where a is the recipe's steepness, but at most 1/4 octave. This safety margin
    minimizes the expected loss of a run under two assumptions. First, the loss grows as
    exp(a·u) at u octaves above the optimum. Second, the optimum has a normal
    distribution with standard deviation `sd`. If the recipe's steepness is 0, the
    function returns the recipe's `margin` instead.
    """
    if not recipe.steepness:
        return recipe.margin
    return min(recipe.steepness * sd * sd / 2, MOST_MARGIN)


def law_multiplier(recipe: Recipe, at: Reference, reference: Reference) -> float:
    """Return the factor that converts the reference's learning rate to a configuration.

    The conversion factor comes from the recipe's scaling law. If the trials included full
    finetuning, the law already contains the fitted ratio between LoRA and full finetuning. If the
    trials did not include full finetuning, `to_full` or `from_full` converts between LoRA and full
    finetuning.

    Args:
        recipe: the recipe.
        at: the configuration, with its fan-in.
        reference: the recipe's reference, with its fan-in.

    Raises:
        LawError: the scaling law returned an unusable multiplier for this configuration.
    """
    if at.method == reference.method or recipe.full_seen:
        return checked_multiplier(recipe.law, at.as_factor(), reference)
    if at.method == "full":
        return to_full(recipe.law, at.as_factor(), reference, of_recipe=True)
    return from_full(recipe.law, at.as_factor(), reference, of_recipe=True)


def _with_widths(recipe: Recipe, at: Reference) -> tuple[Reference, Reference]:
    """Return a configuration and the recipe's reference, both with the width of a model.

    If the width in the recipe's reference is unknown, the function uses the width that the user
    passed, or otherwise a default width.
    """
    own = recipe.reference
    if own.fan_in is not None:
        return at, own
    if at.fan_in is None and (at.method, at.init) != (own.method, own.init):
        name, target = recipe.name, at
        raise RecipeError(
            f"Recipe {name!r} cannot compute the learning rate for {target} without the width of"
            " the model, which the recipe does not contain.",
            "Pass the width of the model, for example fan_in=4096.",
        )
    width = at.fan_in or ANY_WIDTH
    return replace(at, fan_in=width), replace(own, fan_in=width)


def _configuration_text(recipe: Recipe, at: Reference, steps: int | None) -> str:
    """Describe a configuration in words. If the number of steps or the batch size is None, the
    function uses the value in the recipe.
    """
    words = [str(at)]
    if at.fan_in is not None:
        words.append(f"fan-in {round(at.fan_in)}")
    steps = steps or recipe.steps
    batch = at.batch or recipe.batch
    if steps is not None:
        words.append(f"{steps} steps")
    if batch is not None:
        words.append(f"batch {batch:g}")
    return ", ".join(words)


# --- how certain a learning rate is ---------------------------------------------------------------


def spread(
    recipe: Recipe, at: Reference, steps: int | None = None
) -> tuple[float, list[str]]:
    """Return the uncertainty of the best learning rate, with notes that explain the uncertainty.

    The uncertainty is the standard deviation of log2 of the best learning rate, in octaves. The
    notes list the differences between the configuration and the trials. The variance is the sum of
    three terms:

    * The variance of the fit is x·C·x, where C is the recipe's covariance. The vector x is the
      gradient of the log2 best learning rate with respect to the fitted values (base, drift and
      factor of full finetuning).
    * For LoRA, the variance of the deviations of single ranks from the scaling law is added.
    * Each difference between the requested configuration and the trials increases the variance.
    """
    law = recipe.law
    reach = 0.0
    if law.to_full:
        # The fitted drift continues from the pivot rank to full rank, so its uncertainty does too.
        reach = math.log2((at.fan_in or law.pivot) / law.pivot)
    x = Prior(pivot=law.pivot, full_reach=reach).row(at.rank)
    variance = max(0.0, float(x @ recipe.covariance @ x))
    if at.method == "lora":  # for full finetuning, a fitted factor replaces the scatter
        variance += recipe.scatter**2
    notes = []
    for sd, note in (*_untried(recipe, at), *_other_run(recipe, at, steps)):
        variance += sd**2
        notes.append(note)
    # Two runs of the same configuration also differ, so the scatter is the smallest uncertainty.
    return math.sqrt(max(variance, recipe.scatter**2)), notes


def _untried(recipe: Recipe, at: Reference) -> Iterator[tuple[float, str]]:
    """Yield an uncertainty and a note for each difference between a model and the trials.

    Each uncertainty is a standard deviation in octaves of the best learning rate. This
    function compares the method, rank, width and init. The function `_other_run`
    compares the steps and the batch size.
    """
    if at.method == "full":
        width = recipe.full_fan_in
        if not recipe.full_seen:
            yield _full_not_tried(recipe, at)
    else:
        width = recipe.reference.fan_in
        yield from _other_rank(recipe, at.rank)
    if at.fan_in and width and not math.isclose(at.fan_in, width, rel_tol=0.01):
        here = round(at.fan_in, 1)
        own = round(width, 1)
        words = f"the model's fan-in is {here:g}, but the trials had fan-in {own:g}"
        yield WIDTH_SD * math.log2(at.fan_in / width), words
    if at.init != recipe.reference.init:
        yield (
            INIT_SD,
            f"init {at.init} was not tried, so the scaling law converts the learning rate from the"
            " other init",
        )


def _full_not_tried(recipe: Recipe, at: Reference) -> tuple[float, str]:
    """Return how uncertain full finetuning is without trials of full finetuning, and a note."""
    law = recipe.law
    # With B = 0 at the start, the law applies the drift only between the ranks tried. Nobody knows
    # how much of the drift continues up to full finetuning, so a fraction widens the interval.
    octaves = math.log2((at.fan_in or law.pivot) / law.pivot)
    drift = 0.0 if law.to_full else law.exponent * octaves
    return (
        DRIFT_SHARE * drift,
        "full finetuning was not tried, so its learning rate is converted from LoRA at init"
        f" {recipe.reference.init}. {FULL_TRUST}{_in_bfloat16(recipe)} To measure it, call"
        " ra.calibrate(trainer_of_the_full_model, optimizer). If your function builds a model for"
        " each trial, call ra.calibrate(train, ..., full_trials=3). In a sweep, add rows with rank"
        " 'full'",
    )


def _in_bfloat16(recipe: Recipe) -> str:
    """Return a note for models that train in bfloat16, or an empty string if no published
    measurements apply.
    """
    if not is_measured(recipe.law, recipe.reference, of_recipe=True):
        return ""
    return (
        " This learning rate is for float32 weights or float32 master weights. If the weights"
        f" themselves train in bfloat16, the best learning rate is {BFLOAT16:g} times as high,"
        " and the optimizer applies this factor."
    )


def _other_rank(recipe: Recipe, rank: int | None) -> Iterator[tuple[float, str]]:
    """Yield a standard deviation and a note if a rank is outside the range of the tried ranks."""
    assert rank is not None  # a LoRA configuration always has a rank
    # Without LoRA trials, count the rank as one octave away from a tried rank.
    tried = recipe.ranks or (rank / 2,)
    below = math.log2(min(tried) / rank)
    above = math.log2(rank / max(tried))
    if max(below, above) <= 0:
        return
    listed = ", ".join(map(str, recipe.ranks))
    words = f"rank {rank:g} is outside the range of the ranks tried ({listed})"
    if below > 0 and recipe.reference.init == "B":
        words += (
            ", and when A starts at zero (init B), converted learning rates for lower ranks tend"
            " to be too high"
        )
        yield LOWER_RANK_SD * below, words
    else:
        yield RANK_SD * max(below, above), words


def _other_run(
    recipe: Recipe, at: Reference, steps: int | None
) -> Iterator[tuple[float, str]]:
    """Yield a standard deviation and a note if the number of steps or the batch size is different.

    A different number of steps does not change the learning rate, because the best
    learning rate increases with the steps on some tasks and decreases on others. A
    different number of steps only makes the 90 % interval of the learning rate wider.
    """
    if octaves := _octaves(recipe.name, "steps", recipe.steps, steps):
        sd = math.sqrt(steps_variance(octaves))
        why = f"the recipe is for {recipe.steps} steps, but this learning rate is for {steps}"
        yield sd, f"{why} ({give_or_take(sd)})"
    if octaves := _octaves(recipe.name, "batch", recipe.batch, at.batch):
        sd = BATCH_SD * abs(octaves)
        change = math.log2(_batch_multiplier(recipe, at))
        why = (
            f"the recipe is for batch {recipe.batch:g}, but this learning rate is for batch"
            f" {at.batch:g}"
        )
        beyond = beyond_batches(2.0**octaves) if change else ""
        yield (
            sd,
            f"{why} (multiplied by {2.0**change:.3g}{beyond}, {give_or_take(sd)})",
        )


def _batch_multiplier(recipe: Recipe, at: Reference) -> float:
    """Return the factor that adapts the learning rate to a different batch size."""
    octaves = _octaves(recipe.name, "batch", recipe.batch, at.batch)
    return checked_batch_multiplier(recipe.law, 2.0**octaves) if octaves else 1.0


def _octaves(name: str, quantity: str, own: float | None, asked: float | None) -> float:
    """Return log2 of the ratio between the requested steps or batch size and the recipe's value."""
    if asked is None:
        return 0.0
    asked = plain(asked)
    check_range(quantity, asked, quantity, RecipeError)
    if own is None:
        raise RecipeError(
            f"Recipe {name!r} cannot be converted to {quantity}={asked:g}, because the recipe does"
            f" not contain the {quantity} of its trials.",
            f"Remove {quantity}= from the call, or set {quantity}= when you create the recipe.",
        )
    return math.log2(asked / own)


# --- configurations -------------------------------------------------------------------------------


def configuration(
    recipe: Recipe,
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    init: Literal["A", "B"] | None = None,
    method: Method = "lora",
    fan_in: float | None = None,
    batch: float | None = None,
) -> Reference:
    """Create a `Reference` from the arguments of `Recipe.at`.

    If an argument is None, the function uses the value in the recipe.
    """
    own = recipe.reference
    if method == "full":
        if rslora or (rank, alpha, init) != (None, None, None):
            raise RecipeError(
                "Full finetuning has no rank, alpha, rslora or init, but at least one of these"
                " arguments was passed.",
                "Remove these arguments, or remove method='full' (in a shell: --full).",
            )
        width = recipe.full_fan_in or own.fan_in
        at = Reference(method="full", init=own.init, fan_in=width)
    else:
        at = _lora(recipe, own.rank if rank is None else rank, alpha, rslora, method)
    return replace(
        at,
        init=at.init if init is None else init,
        fan_in=at.fan_in if fan_in is None else fan_in,
        batch=batch,
    )


def _lora(
    recipe: Recipe,
    rank: int | None,
    alpha: float | None,
    rslora: bool,
    method: Method,
) -> Reference:
    """Return a LoRA configuration with a given rank and alpha, and with the init and width of the
    recipe.

    If alpha is None, the function computes it from the scaling rule of the recipe.
    """
    own = recipe.reference
    if rank is None:
        name = recipe.name
        raise RecipeError(
            f"Recipe {name!r} contains only trials of full finetuning, so it has no default LoRA"
            " rank.",
            "Call at(method='full'), or pass a rank and an alpha, for example at(rank=16,"
            " alpha=32).",
        )
    # The reference checks the rank before alpha is computed from it.
    given = 1.0 if alpha is None else alpha
    at = Reference(rank, given, rslora, own.init, own.fan_in, method)
    if alpha is not None:
        return at
    gamma = _GAMMA.get(recipe.scaling_rule, 0.0 if rank == own.rank else None)
    if rslora or gamma is None or own.rank is None:
        raise _alpha_needed(recipe, rank, rslora)
    scaling = own.scaling * (own.rank / rank) ** gamma
    return replace(at, alpha=scaling * rank)


def _alpha_needed(recipe: Recipe, rank: int, rslora: bool) -> RecipeError:
    """Create the error for a missing alpha that cannot be computed from the trials."""
    own = recipe.reference
    if rslora:
        return RecipeError(
            "rslora=True was passed without alpha, but both are needed to compute the learning"
            " rate.",
            f"Pass alpha too: at(rank={rank}, alpha=..., rslora=True).",
        )
    why = "the alphas of the tried ranks do not follow a common rule"
    calls = f"Pass alpha, for example at(rank={rank}, alpha={2 * rank})."
    if len(recipe.ranks) == 1 and own.alpha is not None:
        proportional = own.alpha / recipe.ranks[0] * rank
        also = ", rslora=True" if own.rslora else ""
        why = f"only rank {recipe.ranks[0]} was tried"
        calls = (
            f"Call at(rank={rank}, alpha={proportional:g}{also}) if your alpha is proportional to"
            f" the rank, or at(rank={rank}, alpha={own.alpha:g}{also}) if it is fixed."
        )
    elif not recipe.ranks:
        why = "no LoRA rank was tried"
    return RecipeError(
        f"Recipe {recipe.name!r} cannot choose an alpha for rank {rank}, because {why}.",
        calls,
    )


def infer_scaling(models: Iterable[Reference]) -> Scaling:
    """Find out how LoRA's scaling depends on the rank in a list of configurations.

    If all configurations have the same rank, or if no rule fits, the result is "unknown".

    >>> infer_scaling([Reference(4, 4), Reference(64, 64)])
    'fixed'
    >>> infer_scaling([Reference(4, 16), Reference(64, 16)])
    'alpha'
    >>> infer_scaling([Reference(8, 16)])
    'unknown'
    """
    scalings = {(at.rank, at.scaling) for at in models if at.rank}
    if len({rank for rank, _ in scalings}) < 2:
        return "unknown"
    for rule, gamma in _GAMMA.items():
        constants = [math.log2(s) + gamma * math.log2(r) for r, s in scalings]
        if max(constants) - min(constants) < 1e-3:
            return rule
    return "unknown"


def is_for(recipe: Recipe, optimizer: type) -> bool:
    """Return whether a recipe was made for an optimizer or its variant with quantized states."""
    name = recipe.optimizer.rpartition(".")[2]
    known = known_optimizer(name)[0]
    return name == optimizer.__name__ or (
        known != "" and known == known_optimizer(optimizer)[0]
    )


def name_pattern(name: str) -> str:
    """Replace each number in a parameter's name with "*", so that all layers have the same pattern.

    >>> name_pattern("layers.11.norm1.weight")
    'layers.*.norm1.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
