"""How a recipe's learning rate at a configuration is computed: `rate`.

The best learning rate is the fitted one, converted by the scaling law. The margin and the 90 %
interval follow from how certain it is: the standard deviation of the fit, and more for each octave
beyond the configurations that were tried.

(`optimizer/_rates.py` holds the learning rates of an optimizer's groups, which may come from here.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from .._checks import check_range, plain
from .._optimizers import known_optimizer
from .._printing import give_or_take, times
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

# Each comment ends with the constant's evidence: a page of benchmarks/results, a question of
# benchmarks/answers.md, or "judgement" if it was chosen without a measurement.
Z90 = 1.645  # standard deviations from the middle of a normal 90 % interval to its end
# Uncertainty for what the trials did not try, as standard deviations: octaves of learning rate per
# octave of rank, of width and of batch, and octaves from one init to the other. They are rules of
# thumb from how published sweeps scatter about the law. For the batch, small sweeps had 0.3 to
# 0.67 octaves: judgement
RANK_SD = 0.1
WIDTH_SD = 0.25
BATCH_SD = 0.15
INIT_SD = 1.0
# RANK_SD for ranks below those tried when A starts at zero. There the best learning rates fall less
# with rank than the trials say: benchmarks/answers.md
LOWER_RANK_SD = 0.2
# When full finetuning was not tried after trials with B = 0: the drift with rank, continued up to
# r = n, widens the interval by this share of itself: judgement
DRIFT_SHARE = 0.5
# Octaves. Larger margins gave no lower loss: benchmarks/answers.md
MOST_MARGIN = 0.25
_NO_MARGIN = 0.01  # octaves. A margin of less than 1 % needs no note
# The width if none is known. Between ranks of one init it nearly cancels: judgement
ANY_WIDTH = 4096.0
# The scaling s follows the rank as s = c·r^(−γ). This is γ for every scaling rule.
_GAMMA: dict[Scaling, float] = {"fixed": 0.0, "rslora": 0.5, "alpha": 1.0}


def rate(recipe: Recipe, at: Reference, steps: int | None = None) -> Rate:
    """Return the learning rate at a configuration. Its first notes are on anything that the trials
    did not try.

    The best learning rate is fitted_lr · law(at) / law(reference), converted to the batch. The one
    to use is `margin` octaves below it. The 90 % interval reaches 1.645 standard deviations to
    either side of the best one.

    Args:
        recipe: the recipe.
        at: the configuration. A missing fan-in or batch is the recipe's own.
        steps: optimizer steps, by default the recipe's own.

    Raises:
        RecipeError: steps, batch or a fan-in is missing or impossible, or the learning rate would
            not be a positive finite number.
        LawError: the law has no usable multiplier there.
    """
    # `at` may lack a width, `here` always has one.
    here, reference = _with_widths(recipe, at)
    sd, notes = spread(recipe, here, steps)
    is_extrapolated = bool(notes)
    try:
        multiplier = law_multiplier(recipe, here, reference)
        multiplier *= _batch_multiplier(recipe, at)
        width = 2.0 ** (Z90 * sd)
    except OverflowError:
        multiplier = width = math.inf
    best = recipe.fitted_lr * multiplier
    # The margin belongs to this configuration: where the best rate is less certain, it is larger.
    octaves = margin(recipe, sd)
    if octaves > _NO_MARGIN:
        notes.append(
            f"the learning rate is {2.0**-octaves:.3g} times the best one, a safety margin, because"
            " too high costs more than too low"
        )
    # The ceiling of LoRA runs does not apply to full finetuning.
    ceiling = None
    if recipe.ceiling is not None and (at.method == "lora" or recipe.full_seen):
        ceiling = recipe.ceiling * multiplier
    low = best / width
    high = best * width
    lr = best * 2.0**-octaves
    if not all(0 < edge < math.inf for edge in (lr, low, high, ceiling or lr)):
        raise RecipeError(
            f"At {here}, recipe {recipe.name!r} gives a learning rate or an interval that is not a"
            " positive finite number.",
            "Ask for a configuration closer to its own, or restore the recipe's file.",
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
    """Warn if a learning rate is extrapolated."""
    if rate.extrapolated:
        warn(f"Recipe {recipe.name!r} extrapolates: {rate.notes[0]}.")


def margin(recipe: Recipe, sd: float) -> float:
    """Return how many octaves to stay below the best learning rate: a·sd²/2 for a steepness of a,
    at most 1/4. Without a steepness it is the recipe's own margin.

    This margin minimizes the expected loss if the loss rises as exp(a·u) at u octaves above the
    optimum, and the optimum is normal with standard deviation `sd`, in octaves.
    """
    if not recipe.steepness:
        return recipe.margin
    return min(recipe.steepness * sd * sd / 2, MOST_MARGIN)


def law_multiplier(recipe: Recipe, at: Reference, reference: Reference) -> float:
    """Return the ratio of a configuration's learning rate to that at the reference, by the recipe's
    law.

    Between LoRA and full finetuning it is `to_full` or `from_full`. If the trials included full
    finetuning, the law itself holds the ratio that was fitted.

    Args:
        recipe: the recipe.
        at: the configuration, with its fan-in.
        reference: the recipe's reference, with its fan-in.

    Raises:
        LawError: the law has no usable multiplier there.
    """
    if at.method == reference.method or recipe.full_seen:
        return checked_multiplier(recipe.law, at.as_factor(), reference)
    if at.method == "full":
        return to_full(recipe.law, at.as_factor(), reference, of_recipe=True)
    return from_full(recipe.law, at.as_factor(), reference, of_recipe=True)


def _with_widths(recipe: Recipe, at: Reference) -> tuple[Reference, Reference]:
    """Return a configuration and the recipe's reference. Both get a width if the reference has
    none.
    """
    own = recipe.reference
    if own.fan_in is not None:
        return at, own
    if at.fan_in is None and (at.method, at.init) != (own.method, own.init):
        raise RecipeError(
            f"Recipe {recipe.name!r} has no fan-in, but the learning rate for {at} depends on it.",
            "Pass the model's width as fan_in=.",
        )
    width = at.fan_in or ANY_WIDTH
    return replace(at, fan_in=width), replace(own, fan_in=width)


def _configuration_text(recipe: Recipe, at: Reference, steps: int | None) -> str:
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
    """Return the standard deviation of log2 of the best learning rate, octaves, and notes on what
    was not tried.

    The variance has three parts. The fit's own is x·C·x for the covariance C and the design vector
    x of the rank: the gradient of its log2 best learning rate with respect to (base, drift, factor
    of full finetuning). LoRA adds the scatter of one rank about the law. Each thing that was not
    tried adds its own.
    """
    law = recipe.law
    reach = 0.0
    if law.to_full:
        reach = math.log2((at.fan_in or law.pivot) / law.pivot)
    x = Prior(pivot=law.pivot, full_reach=reach).row(at.rank)
    variance = max(0.0, float(x @ recipe.covariance @ x))
    if at.method == "lora":  # full finetuning has a fitted factor of its own instead
        variance += recipe.scatter**2
    notes = []
    for sd, note in (*_untried(recipe, at), *_other_run(recipe, at, steps)):
        variance += sd**2
        notes.append(note)
    return math.sqrt(max(variance, recipe.scatter**2)), notes


def _untried(recipe: Recipe, at: Reference) -> Iterator[tuple[float, str]]:
    """Yield, for each part of a configuration that was not tried, the standard deviation that it
    adds, in octaves, and a note.
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
        words = f"the fan-in is {here:g}, but the recipe's own is {own:g}"
        yield WIDTH_SD * math.log2(at.fan_in / width), words
    if at.init != recipe.reference.init:
        yield (
            INIT_SD,
            f"init {at.init} was not tried: the scaling law converts the learning rate from the"
            " other init",
        )


def _full_not_tried(recipe: Recipe, at: Reference) -> tuple[float, str]:
    law = recipe.law
    # At B = 0 the law's drift ends at the ranks tried. How much of it continues up to full
    # finetuning is unknown, so a share of it widens the interval.
    octaves = math.log2((at.fan_in or law.pivot) / law.pivot)
    drift = 0.0 if law.to_full else law.exponent * octaves
    return (
        DRIFT_SHARE * drift,
        "full finetuning was not tried: its learning rate is converted from LoRA at init"
        f" {recipe.reference.init}. {FULL_TRUST}{_in_bfloat16(recipe)} Trials of full finetuning"
        " settle it: ra.calibrate(trainer_of_the_full_model, optimizer), calibrate(train, ...,"
        " full_trials=3) for a function that builds a model, or rows of rank 'full' in a sweep",
    )


def _in_bfloat16(recipe: Recipe) -> str:
    """Return the advice for weights that train in bfloat16, "" if their ratio was not measured."""
    if not is_measured(recipe.law, recipe.reference, of_recipe=True):
        return ""
    return (
        " It is for float32 weights or float32 masters. If the weights themselves train in"
        f" bfloat16, the best learning rate is {BFLOAT16:g} times as high, and the optimizer"
        " multiplies it."
    )


def _other_rank(recipe: Recipe, rank: int | None) -> Iterator[tuple[float, str]]:
    """Yield the standard deviation that a rank outside the tried ones adds, and a note."""
    assert rank is not None  # a LoRA configuration always has a rank
    tried = recipe.ranks or (rank / 2,)
    below = math.log2(min(tried) / rank)
    above = math.log2(rank / max(tried))
    if max(below, above) <= 0:
        return
    listed = ", ".join(map(str, recipe.ranks))
    words = f"rank {rank:g} is outside the ranks tried ({listed})"
    if below > 0 and recipe.reference.init == "B":
        words += ": when A starts at zero (init B), the learning rate there tends to be too high"
        yield LOWER_RANK_SD * below, words
    else:
        yield RANK_SD * max(below, above), words


def _other_run(
    recipe: Recipe, at: Reference, steps: int | None
) -> Iterator[tuple[float, str]]:
    """Yield the standard deviations that another number of steps and another batch add, with notes.

    With other steps the learning rate stays, because best ones rise with the steps on some tasks
    and fall on others. Its interval widens as the fit's does.
    """
    if octaves := _octaves(recipe.name, "steps", recipe.steps, steps):
        sd = math.sqrt(steps_variance(octaves))
        why = f"{steps} steps instead of {recipe.steps}: an extrapolation"
        yield sd, f"{why}, {give_or_take(sd)}"
    if octaves := _octaves(recipe.name, "batch", recipe.batch, at.batch):
        sd = BATCH_SD * abs(octaves)
        change = math.log2(_batch_multiplier(recipe, at))
        why = f"batch {at.batch:g} instead of {recipe.batch:g}: an extrapolation"
        beyond = beyond_batches(2.0**octaves) if change else ""
        yield sd, f"{why} by {times(change)}{beyond}, {give_or_take(sd)}"


def _batch_multiplier(recipe: Recipe, at: Reference) -> float:
    """Return the factor of the learning rate for another batch, by the law's rule."""
    octaves = _octaves(recipe.name, "batch", recipe.batch, at.batch)
    return checked_batch_multiplier(recipe.law, 2.0**octaves) if octaves else 1.0


def _octaves(
    recipe: str, quantity: str, own: float | None, asked: float | None
) -> float:
    """Return log2 of asked / own, for a recipe's "steps" or "batch"."""
    if asked is None:
        return 0.0
    asked = plain(asked)
    check_range(quantity, asked, quantity, RecipeError)
    if own is None:
        raise RecipeError(
            f"Recipe {recipe!r} does not record its own {quantity}, so its learning rate cannot be"
            f" converted to {quantity}={asked:g}.",
            f"Remove {quantity}=, or make the recipe again with {quantity}= set.",
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
    """Return the arguments of `Recipe.at` as a reference. An argument that is None is the recipe's
    own.
    """
    own = recipe.reference
    if method == "full":
        if rslora or (rank, alpha, init) != (None, None, None):
            raise RecipeError(
                "Full finetuning has no rank, alpha, rslora or init.",
                "Remove them from the call, or remove method='full'.",
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
    """Return the reference of a rank and alpha at the recipe's init and width. Without alpha the
    scaling follows the rule of the trials.
    """
    own = recipe.reference
    if rank is None:
        raise RecipeError(
            f"Recipe {recipe.name!r} has only full finetuning, so it has no rank of its own.",
            "Call at(method='full'), or pass a rank and an alpha.",
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
    """Return the error of a call without alpha, if the trials show no rule for alpha."""
    own = recipe.reference
    if rslora:
        return RecipeError(
            "rslora=True was given without alpha.",
            f"Pass both: at(rank={rank}, alpha=..., rslora=True).",
        )
    why = "the alphas of the ranks tried follow no common rule"
    calls = f"Pass alpha: at(rank={rank}, alpha=...)."
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
        f"Recipe {recipe.name!r} does not say which alpha rank {rank} has: {why}.",
        calls,
    )


def infer_scaling(models: Iterable[Reference]) -> Scaling:
    """Return the rule by which the scaling follows the rank, "unknown" if there is only one rank.

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
    """Return whether an optimizer class is the recipe's, or its variant with a quantized state."""
    name = recipe.optimizer.rpartition(".")[2]
    known = known_optimizer(name)[0]
    return name == optimizer.__name__ or (
        known != "" and known == known_optimizer(optimizer)[0]
    )


def name_pattern(name: str) -> str:
    """Return a parameter's name with "*" for numbers, so that all layers share one pattern.

    >>> name_pattern("layers.11.norm1.weight")
    'layers.*.norm1.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
