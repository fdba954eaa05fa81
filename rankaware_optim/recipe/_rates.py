"""How a rate is computed from a recipe: `rate`, and `configuration` for its place.

The best rate is the fitted one, moved by the law. The margin and the band follow from how certain
it is: the fit's standard deviation, and more for each octave beyond what was tried.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from .._checks import check_range, plain
from .._optimizers import known_optimizer
from .._printing import give_or_take, times
from .._rate import Rate
from .._types import Method, Reference, Scaling
from .._warn import warn
from ..errors import RecipeError
from ..fitting import FULL_SD, Prior, steps_variance
from ..laws import beyond_batches, checked_batch_multiplier, checked_multiplier
from ._record import Record

# The end of each comment is a constant's evidence: a page of benchmarks/results, or "by hand".
Z90 = 1.645  # standard deviations to the end of a 90 % band: its meaning
# What is added outside the data: standard deviations, octaves of rate per octave of rank, of width
# and of batch, and octaves from one init to the other. They are rules of thumb from the spread of
# published sweeps about the law, for the batch from small sweeps (.3 to .67): by hand
RANK_SD = 0.1
WIDTH_SD = 0.25
BATCH_SD = 0.15
INIT_SD = 1.0
# RANK_SD for a rank below those tried at A = 0, where best rates fall less with rank than the
# trials say: frozen answers
LOWER_RANK_SD = 0.2
# Share of a drift at B = 0, continued to r = n, by which the band of full finetuning is widened: by
# hand
DRIFT_SHARE = 0.5
# Octaves. Larger margins lost no less: frozen answers
MOST_MARGIN = 0.25
# The width where none is known, which nearly cancels between ranks of one init: by hand
ANY_WIDTH = 4096.0
# The scaling s follows the rank as s = c·r^(−γ): γ of every rule
_GAMMA: dict[Scaling, float] = {"fixed": 0.0, "rslora": 0.5, "alpha": 1.0}


def rate(recipe: Record, at: Reference, steps: int | None = None) -> Rate:
    """Return the rate at a configuration. Its first notes say what was not tried.

    The best rate is fitted_lr · law(at) / law(reference), moved to the batch. The rate to use is
    `margin` octaves below it, and the band reaches 1.645 standard deviations to either side.

    Args:
        recipe: the recipe.
        at: the configuration. Without a fan-in or a batch it has the recipe's.
        steps: optimizer steps, by default the recipe's own.

    Raises:
        RecipeError: steps, batch or a fan-in is missing or impossible, or the rate would not be a
            positive finite number.
        LawError: the law has no usable multiplier there.
    """
    here, reference = _with_widths(recipe, at)
    sd, notes = spread(recipe, here, steps)
    is_extrapolated = bool(notes)
    try:
        moved = checked_multiplier(recipe.law, here.as_factor(), reference)
        moved *= _batch_multiplier(recipe, at)
        width = 2.0 ** (Z90 * sd)
    except OverflowError:
        moved = width = math.inf
    best = recipe.fitted_lr * moved
    octaves = margin(recipe, sd)
    if octaves:
        notes.append(
            f"a margin of {times(-octaves)} below the best, since too high costs more"
        )
    ceiling = None
    if recipe.ceiling is not None and (at.method == "lora" or recipe.full_seen):
        ceiling = recipe.ceiling * moved
    low = best / width
    high = best * width
    lr = best * 2.0**-octaves
    if not all(0 < edge < math.inf for edge in (lr, low, high, ceiling or lr)):
        raise RecipeError(
            f"Recipe {recipe.name!r} gives {here} a rate or a band that is not positive and"
            " finite.",
            "Ask for a configuration nearer to its own, or restore the recipe.",
        )
    return Rate(
        lr,
        low=low,
        high=high,
        ceiling=ceiling,
        extrapolated=is_extrapolated,
        notes=(*notes, *recipe.notes),
        configuration=_configuration_text(recipe, at, steps),
    )


def warn_of(recipe: Record, rate: Rate) -> None:
    """Warn if a rate is extrapolated."""
    if rate.extrapolated:
        warn(f"Recipe {recipe.name!r} extrapolates: {rate.notes[0]}.")


def margin(recipe: Record, sd: float) -> float:
    """Return how far below the best rate to stay, octaves: a·sd²/2 for a steepness of a, at most
    1/4. Without a steepness it is the recipe's own margin.

    This margin minimizes the expected loss if the loss above the optimum rises as exp(a·u), u in
    octaves. sd: the standard deviation of the best rate, octaves.
    """
    if not recipe.steepness:
        return recipe.margin
    return min(recipe.steepness * sd * sd / 2, MOST_MARGIN)


def _with_widths(recipe: Record, at: Reference) -> tuple[Reference, Reference]:
    """Return a configuration and the recipe's reference, with a width if the reference has none."""
    own = recipe.reference
    if own.fan_in is not None:
        return at, own
    if at.fan_in is None and (at.method, at.init) != (own.method, own.init):
        raise RecipeError(
            f"Recipe {recipe.name!r} has no fan-in, and the rate for {at} depends on it.",
            "Give the model's width as fan_in.",
        )
    width = at.fan_in or ANY_WIDTH
    return replace(at, fan_in=width), replace(own, fan_in=width)


def _configuration_text(recipe: Record, at: Reference, steps: int | None) -> str:
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


# --- how certain a rate is ------------------------------------------------------------------------


def spread(
    recipe: Record, at: Reference, steps: int | None = None
) -> tuple[float, list[str]]:
    """Return the standard deviation of log2 of the best rate, octaves, and notes on what was not
    tried.
    """
    law = recipe.law
    reach = 0.0
    if law.to_full:
        reach = math.log2((at.fan_in or law.pivot) / law.pivot)
    x = Prior(pivot=law.pivot, full_reach=reach).row(at.rank)
    variance = max(0.0, float(x @ recipe.covariance @ x))
    if (
        at.method == "lora"
    ):  # full finetuning has its own factor, so no scatter about the law
        variance += recipe.scatter**2
    notes = []
    for sd, note in (*_untried(recipe, at), *_other_run(recipe, at, steps)):
        variance += sd**2
        notes.append(note)
    return math.sqrt(max(variance, recipe.scatter**2)), notes


def _untried(recipe: Record, at: Reference) -> Iterator[tuple[float, str]]:
    """Yield what of a configuration was not tried: the standard deviation that it adds, octaves,
    and a note.
    """
    if at.method == "full":
        width = recipe.full_fan_in
        if not recipe.full_seen:
            law = recipe.law
            init = recipe.reference.init
            octaves = math.log2((at.fan_in or law.pivot) / law.pivot)
            drift = 0.0 if law.to_full else law.exponent * octaves
            yield (
                DRIFT_SHARE * drift,
                f"full finetuning was not tried: the rate is the law's, from LoRA at"
                f" init {init} alone. Over the tasks of a study it was off by a factor of"
                f" {2.0 ** FULL_SD[init]:.2g} (one standard deviation). Three full runs (calibrate"
                " with full_trials=3) would settle it",
            )
    else:
        width = recipe.reference.fan_in
        yield from _other_rank(recipe, float(at.rank or recipe.law.pivot))
    if at.fan_in and width and not math.isclose(at.fan_in, width, rel_tol=0.01):
        here = round(at.fan_in, 1)
        own = round(width, 1)
        words = f"fan-in {here:g} is not the recipe's own {own:g}"
        yield WIDTH_SD * math.log2(at.fan_in / width), words
    if at.init != recipe.reference.init:
        words = (
            f"init {at.init} was not tried: the law moves the rate from the other init"
        )
        yield INIT_SD, words


def _other_rank(recipe: Record, rank: float) -> Iterator[tuple[float, str]]:
    """Yield what a rank beyond those tried adds, and the note on it."""
    tried = recipe.ranks or (rank / 2,)
    below = math.log2(min(tried) / rank)
    above = math.log2(rank / max(tried))
    if max(below, above) <= 0:
        return
    listed = ", ".join(map(str, recipe.ranks))
    words = f"rank {rank:g} is outside the ranks tried ({listed})"
    if below > 0 and recipe.reference.init == "B":
        words += ": with init B the rate tends to be too high"
        yield LOWER_RANK_SD * below, words
    else:
        yield RANK_SD * max(below, above), words


def _other_run(
    recipe: Record, at: Reference, steps: int | None
) -> Iterator[tuple[float, str]]:
    """Yield what another number of steps and another batch add, and the notes on them.

    With other steps the rate stays, and its band grows as that of a fit does.
    """
    if octaves := _octaves(recipe, "steps", steps):
        sd = math.sqrt(steps_variance(octaves))
        why = f"{steps} steps instead of {recipe.steps}: an extrapolation"
        yield sd, f"{why}, {give_or_take(sd)}"
    if octaves := _octaves(recipe, "batch", at.batch):
        sd = BATCH_SD * abs(octaves)
        move = math.log2(_batch_multiplier(recipe, at))
        why = f"batch {at.batch:g} instead of {recipe.batch:g}: an extrapolation"
        beyond = beyond_batches(2.0**octaves) if move else ""
        yield sd, f"{why} by {times(move)}{beyond}, {give_or_take(sd)}"


def _batch_multiplier(recipe: Record, at: Reference) -> float:
    """Return the factor of the rate for another batch, by the law's rule."""
    octaves = _octaves(recipe, "batch", at.batch)
    return checked_batch_multiplier(recipe.law, 2.0**octaves) if octaves else 1.0


def _octaves(recipe: Record, what: str, asked: float | None) -> float:
    """Return log2 of the change of the steps or of the batch from the recipe's own."""
    own = getattr(recipe, what)
    if asked is None:
        return 0.0
    asked = plain(asked)
    check_range(what, asked, what, RecipeError)
    if own is None:
        raise RecipeError(
            f"Recipe {recipe.name!r} does not give its own {what}, so the rate cannot be moved to"
            f" {asked:g}.",
            f"Leave {what}= out, or calibrate with {what}=.",
        )
    return math.log2(asked / own)


# --- configurations -------------------------------------------------------------------------------


def configuration(
    recipe: Record,
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    init: Literal["A", "B"] | None = None,
    method: Method = "lora",
    **others: float | None,
) -> Reference:
    """Return the arguments of `Recipe.at` as a reference. What is not given is the recipe's own.

    others: the fan-in and the batch.
    """
    own = recipe.reference
    if method == "full":
        if rslora or (rank, alpha, init) != (None, None, None):
            raise RecipeError(
                "Full finetuning has no rank, alpha, rslora or init.", "Leave them out."
            )
        width = recipe.full_fan_in or own.fan_in
        at = Reference(method="full", init=own.init, fan_in=width)
    else:
        at = _lora(recipe, own.rank if rank is None else rank, alpha, rslora, method)
    given: dict[str, Any] = {"init": init, **others}
    return replace(at, **{k: v for k, v in given.items() if v is not None})


def _lora(
    recipe: Record, rank: Any, alpha: float | None, rslora: bool, method: Method
) -> Reference:
    """Return a rank and alpha at the recipe's init and width. Without alpha the scaling follows the
    rule of the trials.
    """
    own = recipe.reference
    rule = recipe.scaling_rule
    given = 1.0 if alpha is None else alpha
    at = Reference(rank, given, rslora, own.init, own.fan_in, method)
    if alpha is not None:
        return at
    gamma = _GAMMA.get(rule, 0.0 if rank == own.rank else None)
    if rslora or gamma is None or own.rank is None:
        raise RecipeError(
            f"Recipe {recipe.name!r} has no rule for alpha at this rank, or rslora was given.",
            "Give an alpha too.",
        )
    scaling = own.scaling * (own.rank / rank) ** gamma
    return replace(at, alpha=scaling * rank)


def infer_scaling(models: Iterable[Reference]) -> Scaling:
    """Return the rule by which the scaling follows the rank; "unknown" for one rank.

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


def is_for(recipe: Record, optimizer: type) -> bool:
    """Return whether an optimizer is the recipe's, or its variant with a quantized state."""
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
