"""What the trials of a calibration tell: its fit, its best rate so far, and its recipe. It writes
nothing.

The only parameter is log2 of the base rate in *reference coordinates*. A rate at any rank is mapped
back by the law at its prior means, so that trials at several ranks enter one fit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .._optimizers import optimizer_family
from .._printing import give_or_take
from .._rate import Rate
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import (
    Fit,
    Observation,
    at_target,
    centred_law,
    diverged,
    end_of,
    fit_observations,
    prior_of,
    steps_variance,
)
from ..laws import Power, checked_multiplier
from ..recipe import Z90, Recipe, constructor_settings, infer_scaling, recipe_of
from ._constants import (
    FEWEST_STEPS,
    LONG_WARMUP,
    OPPOSED,
    STRIDE,
    UNDETERMINED,
    USUAL_AT,
    USUAL_LR,
)
from ._few import capped, is_few, read_few
from ._schedule import Options
from ._trials import Build, Trials, rank_words

ALIKE = (
    "every run of a rank and seed has the same value at every rate: nothing was trained, or no rate"
    " moved a weight; see that train takes the steps of the optimizer of trial.optimizer"
)
RISING = (
    "at the lowest rates the value only rose over the run, and it is minimised: where it is an"
    " accuracy or a reward, yield minus it; where it is a loss, give lower rates by lr_range="
)
NONE_FELL = (
    "no run lowered the value over its steps beyond its noise, and one raised it: no rate tried"
    " trains, or the value is to be maximised, and minus it should be yielded"
)
AGAINST = (
    "the scores that train returned are higher where the values that it yielded are lower, and a"
    " score is minimised: where it is an accuracy or a reward, return minus it"
)
DOUBTS = (ALIKE, RISING, AGAINST)  # notes that are warned of
BY_TRAINING = (
    "the scores are the mean of the last training losses: a loss on data held out, which train"
    " returns, is more certain"
)
BY_CHANCE = (
    "the values of the trials differ by no more than chance between rates, so they say nothing of"
    " it: the rate is the suggested one"
)
_PACKAGES = ("rankaware-optim", "torch", "optuna")
_IF_LOADED = ("peft", "transformers", "trl", "accelerate", "lightning", "diffusers")
_ENDS = {"memory": "ran out of memory", "pruned": "was pruned"}


class Calibration:
    """One calibration, as far as its trials have come.

    Args:
        options: what it tries.
        settled: what its first model build.
        trials: returns the trials so far.
    """

    def __init__(
        self, options: Options, build: Build, trials: Callable[[], Trials]
    ) -> None:
        self.options = options
        self.build = build
        self.trials = trials
        self.prior = prior_of(build.reference, options.ranks, build.full_fan_in)
        self.start = first_rate(options, build.reference)
        # the number of observations, and their fit
        self._fit: tuple[int, Fit | None] = (-1, None)

    def law(self, settings: Mapping[str, Any]) -> Power:
        """Return the law at its prior means, for an optimizer of these settings."""
        law = self.options.law.bind(self.options.optimizer, settings)
        return centred_law(law, self.build.reference, self.prior.pivot)

    def fit(self) -> Fit | None:
        """Return the fit of the trials so far, at their steps, or None if every run diverged.

        It is computed once for each number of observations, since a study only adds to them.
        """
        evidence = self.trials().evidence()
        if len(evidence) != self._fit[0]:
            self._fit = len(evidence), fit_observations(evidence, self.prior)
        return self._fit[1]


def first_rate(options: Options, reference: Reference) -> float:
    """Return log2 of the first rate: the middle of the range that is given, else the suggested one,
    else the upper end of the family's usual rates.
    """
    if options.octaves is not None:
        return fmean(options.octaves)
    if options.suggested is not None:
        return math.log2(options.suggested.lr)
    family = optimizer_family(options.optimizer)
    law = options.law.bind(options.optimizer, {})
    multiplier = checked_multiplier(law, reference.as_factor(), USUAL_AT)
    usual = USUAL_LR.get(family, USUAL_LR["sign-like"]) * multiplier
    return STRIDE + math.log2(usual)


# --- the recipe -----------------------------------------------------------------------------------


def calibrated_recipe(
    calibration: Calibration, source: Mapping[str, str] | None = None
) -> Recipe:
    """Return the recipe of the trials so far.

    source: see `source_of`.

    Raises:
        CalibrationError: no run tells of the rate.
    """
    options = calibration.options
    build = calibration.build
    trials = calibration.trials().counted()
    evidence = trials.evidence()
    fit = fit_observations(evidence, calibration.prior)
    if fit is None:
        refuse_ends(trials)
    notes = [*_doubts(options, trials), *what_is_unknown(fit, evidence, options.anchor)]
    best = fit.best(build.reference.rank)
    if options.suggested and (why := _why_suggested(options, trials, best)):
        fit = _fit_of_rate(fit, options.suggested)
        notes.append(why)
    elif is_few(options):
        fit = read_few(fit, build.reference.rank, evidence)
    fit = at_target(fit, options.octaves_to_target)
    if is_few(options):
        fit = capped(fit)
    tried = {seen.rank for seen in evidence}
    settings = trials.settings_in_force()
    return recipe_of(
        fit,
        options.law.bind(options.optimizer, settings),
        build.reference,
        name=options.name,
        scaling_rule=infer_scaling(trials.models()),
        full_fan_in=build.full_fan_in,
        layers=build.layers,
        ranks=tuple(rank for rank in options.lora if rank in tried),
        full_seen=None in tried,
        optimizer=options.optimizer_name,
        settings=constructor_settings(settings, options.optimizer),
        steps=options.target,
        warmup=trials.warmup,
        versions=versions_used(),
        source=source or {},
        other_rates=trials.other_rates(),
        notes=(*notes, *_training_notes(options, trials)),
        tensors=tensors_of(trials, options.steps),
        score="own" if any(run.returned for run in trials.observations()) else "loss",
    )


def versions_used() -> dict[str, str]:
    """Return the versions of Python, this package, its main dependencies, and those libraries that
    are loaded.
    """
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    loaded = [name for name in _IF_LOADED if name in sys.modules]
    for name in (*_PACKAGES, *loaded):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _why_suggested(options: Options, trials: Trials, best: float) -> str:
    """Return why the recipe has the suggested rate, "" if it has the best one of the trials."""
    if options.noisy and trials.differ_by_chance():
        return BY_CHANCE
    if best >= options.floor:
        return ""
    return (
        f"the best rate of the trials is {2.0**best:.3g}, below the suggested one, which is kept:"
        f" trials of {options.steps} steps for a run of {options.target} make low rates look best"
    )


def _fit_of_rate(fit: Fit, rate: Rate) -> Fit:
    """Return a fit that says no more than a rate and its band."""
    assert rate.low is not None  # a suggestion has both ends
    assert rate.high is not None
    sd = math.log2(rate.high / rate.low) / (2 * Z90)
    return replace(
        fit,
        mean=np.array([math.log2(rate.lr), 0.0, 0.0]),
        covariance=np.diag([sd**2, fit.prior.drift_sd**2, fit.prior.full_sd**2]),
        steepness=0.0,
        ceiling=None,
    )


def refuse_ends(trials: Trials) -> NoReturn:
    """Raise a `CalibrationError` on trials of which none tells of the rate."""
    ends = sorted({_ENDS.get(run.end, "diverged") for run in trials})
    raise CalibrationError(
        f"Every one of {len(trials)} runs {' or '.join(ends)}.",
        "Lower the rates, the ranks or the batch, or check the loss (of an accuracy or a reward"
        " yield minus it), the data and the pruner. Runs that are stored are not made again: give"
        " another name or storage too.",
    )


# --- what it says of them -------------------------------------------------------------------------


def what_is_unknown(
    fit: Fit, observations: Sequence[Observation], *bracketed: int | None
) -> Iterator[str]:
    """Yield sentences on what runs do not show: the rate of a rank that always diverged, or whose
    best one is at an end of those tried, and that of all where the loss hardly depends on it.

    bracketed: the ranks that were tried on both sides of their best rate.
    """
    lost = diverged(observations)
    ended = {run.rank for run in observations if run not in lost}
    for rank in dict.fromkeys(run.rank for run in lost if run.rank not in ended):
        yield (
            f"{rank_words(rank)}: every run diverged, so its rate is no measurement, and may"
            " diverge too"
        )
    for rank in bracketed:
        if end := end_of(observations, rank):
            yield (
                f"{rank_words(rank)}: the best rate is the {end} that was tried, so the optimum may"
                f" be {'lower' if end == 'lowest' else 'higher'}"
            )
    if math.sqrt(float(fit.covariance[0, 0])) > UNDETERMINED:
        yield (
            "the data do not determine the rate: the loss hardly depends on it. Longer trials, a"
            " larger batch or a held-out score may"
        )


def _doubts(options: Options, trials: Trials) -> Iterator[str]:
    """Yield sentences on why the trials may say nothing of the rate."""
    if trials.spread() == 0.0 and not options.noisy:
        yield ALIKE
    turns = trials.turns()
    lowest = turns[: max(2, len(turns) // 4)]
    if 1 in lowest and -1 not in lowest:
        yield RISING
    elif 1 in turns and -1 not in turns:
        yield NONE_FELL
    if trials.score_agreement() <= OPPOSED:
        yield AGAINST


def _training_notes(options: Options, trials: Trials) -> Iterator[str]:
    """Yield sentences on what was not tried, and on what makes short trials mislead."""
    if options.target > options.steps:
        sd = math.sqrt(steps_variance(options.octaves_to_target))
        yield (
            f"{options.target} steps were not tried: the rate is that of"
            f" {options.steps}, {give_or_take(sd)}"
        )
    if options.steps < FEWEST_STEPS:
        yield (
            f"trials of {options.steps} steps may mislead: below {FEWEST_STEPS} low rates look best"
        )
    if not any(run.returned for run in trials.observations()):
        yield BY_TRAINING
    warmup = trials.warmup
    if warmup > LONG_WARMUP:
        yield (
            f"the rate rose over {warmup:.0%} of a trial's steps: it belongs to runs that warm up"
            " for as large a share of theirs"
        )
    if unsteady := trials.unsteady():
        rank, seed = unsteady
        yield (
            f"train is not reproducible: two runs of {rank_words(rank)}, seed {seed}, began with"
            " different values, which adds noise; draw everything from trial.seed, and yield the"
            " loss before the step"
        )


@np.errstate(all="ignore")
def tensors_of(
    trials: Trials,
    steps: int,
) -> dict[str, npt.NDArray[Any]]:
    """Return `Recipe.tensors`: each trial's rank (0: full finetuning), seed, rate, score, end,
    steps and curve.

    Curves are padded with NaN, to the steps of a whole run. A pruned run has the score NaN.
    """
    lost = diverged(trials.observations())
    rows = []
    for run in trials:
        if run.x is None:
            continue
        seen = run.observation
        padding = [math.nan] * (steps - len(run.curve))
        row = {
            "rank": run.rank or 0,
            "seed": run.seed,
            "lr": 2.0**run.x,
            "own_lr": math.nan if run.own_lr is None else run.own_lr,
            "value": math.nan if seen is None else seen.value,
            "diverged": seen in lost,
            "pruned": seen is None,
            "steps": len(run.curve),
            "curve": np.array([*run.curve, *padding], np.float32),
        }
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
