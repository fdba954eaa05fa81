"""What the trials of a calibration say: their fit, and the recipe that follows from it. This module
runs no trial, and writes nothing to the storage.

A trial has one parameter, x: log2 of its base learning rate at the *reference configuration*. At
another rank the trial trains at that rate times the law's multiplier, with the law's parameters at
their prior means. So trials at several ranks have one axis, and enter one fit.
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
    end_note,
    fit_observations,
    prior_of,
    steps_variance,
)
from ..laws import Power, checked_multiplier
from ..recipe import Z90, Recipe, constructor_settings, infer_scaling, recipe_of
from ._constants import (
    FEWEST_STEPS,
    LONG_WARMUP,
    STRIDE,
    UNDETERMINED,
    USUAL_AT,
    USUAL_LR,
)
from ._few import capped, is_few, read_few
from ._schedule import Options
from ._trials import Build, Trials, rank_words

# Notes of a recipe that mean that the trials may say nothing, so that they are warnings too.
ALIKE = (
    "every run of a rank and seed has the same value at every learning rate, so nothing was"
    " trained, or no learning rate changed a weight; check that train steps the optimizer that"
    " trial.optimizer returned"
)
RISING = (
    "at the lowest learning rates the value only rose over the run, but calibrate minimises it: if"
    " it is an accuracy or a reward, yield minus the value; if it is a loss, pass lower learning"
    " rates as lr_range="
)
NONE_FELL = (
    "no run lowered the value by more than its noise, and one raised it: no learning rate that was"
    " tried trains the model, or the value should be maximised; in that case yield minus the value"
)
AGAINST = (
    "the runs with the best scores are those whose training losses are worst, and calibrate"
    " minimises the score: if it is an accuracy or a reward, return minus the score"
)
DOUBTS = (ALIKE, RISING, AGAINST)
BY_TRAINING = (
    "a trial's score is the mean of its last training losses; a loss on held-out data, which train"
    " can return, is more certain"
)
BY_CHANCE = (
    "between learning rates the values of the trials differ by no more than chance, so they say"
    " nothing about the learning rate, and the recipe has the suggested one"
)
_PACKAGES = ("rankaware-optim", "torch", "optuna")
_IF_LOADED = ("peft", "transformers", "trl", "accelerate", "lightning", "diffusers")
_ENDS = {"memory": "ran out of memory", "pruned": "was stopped early"}


class Calibration:
    """What the trials of one calibration say so far.

    Args:
        options: what the calibration tries.
        build: what its first trial has built. That model is the reference configuration.
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
        """Return the scaling law at its prior means, for an optimizer with these settings."""
        law = self.options.law.bind(self.options.optimizer, settings)
        return centred_law(law, self.build.reference, self.prior.pivot)

    def fit(self) -> Fit | None:
        """Return the fit of the trials so far, at their steps, or None if every run diverged.

        A study only adds trials. So the fit is computed once for each number of observations.
        """
        evidence = self.trials().evidence()
        if len(evidence) != self._fit[0]:
            self._fit = len(evidence), fit_observations(evidence, self.prior)
        return self._fit[1]


def first_rate(options: Options, reference: Reference) -> float:
    """Return log2 of the first learning rate that the search tries.

    It is the middle of `lr_range` if that was passed, else the suggested learning rate, else the
    upper end of the learning rates that are usual for the optimizer's family.
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
    """Return the recipe that follows from the trials so far.

    Args:
        calibration: what the trials say.
        source: the name of the code that was trained, as {"train": name}.

    Raises:
        CalibrationError: every run diverged, was stopped early or ran out of memory.
    """
    options = calibration.options
    build = calibration.build
    trials = calibration.trials().counted()
    # read and fitted once more, because other workers may have added trials meanwhile
    evidence = trials.evidence()
    fit = fit_observations(evidence, calibration.prior)
    if fit is None:
        refuse_ends(trials)
    notes = [*_doubts(options, trials), *what_is_unknown(fit, evidence, options.anchor)]
    if why := _why_suggested(options, trials, fit.best(build.reference.rank)):
        notes.append(why)
    tried = {seen.rank for seen in evidence}
    settings = trials.settings_in_force()
    return recipe_of(
        _reading(fit, evidence, calibration, by_suggestion=bool(why)),
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


def _reading(
    fit: Fit,
    evidence: Sequence[Observation],
    calibration: Calibration,
    *,
    by_suggestion: bool,
) -> Fit:
    """Return the fit as the recipe reads it, for the steps of the target run.

    Args:
        fit: the fit of the trials.
        evidence: the trials.
        calibration: what they belong to.
        by_suggestion: whether the suggested learning rate replaces the fitted one.
    """
    options = calibration.options
    if by_suggestion and options.suggested is not None:
        fit = _fit_of_rate(fit, options.suggested)
    elif is_few(options):
        fit = read_few(fit, calibration.build.reference.rank, evidence)
    # a longer run widens the interval, which is capped afterwards
    fit = at_target(fit, options.octaves_to_target)
    return capped(fit) if is_few(options) else fit


def versions_used() -> dict[str, str]:
    """Return the versions of Python, of this package and its main dependencies, and of the training
    libraries that are loaded.
    """
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    loaded = [name for name in _IF_LOADED if name in sys.modules]
    for name in (*_PACKAGES, *loaded):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _why_suggested(options: Options, trials: Trials, best: float) -> str:
    """Return why the recipe keeps the suggested learning rate, or "" if the trials decide."""
    if options.suggested is None:
        return ""
    if options.noisy and trials.differ_by_chance():
        return BY_CHANCE
    if best >= options.floor:
        return ""
    return (
        f"the trials were best at {2.0**best:.3g}, which is below the suggested learning rate; the"
        f" recipe has the suggested one, because trials of {options.steps} steps for a run of"
        f" {options.target} make low rates look best"
    )


def _fit_of_rate(fit: Fit, rate: Rate) -> Fit:
    """Return a fit that says only what a suggested learning rate and its interval say."""
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
    """Raise a `CalibrationError` that says how all of these trials ended without a result."""
    ends = sorted({_ENDS.get(run.end, "diverged") for run in trials})
    raise CalibrationError(
        f"Every one of {len(trials)} runs {' or '.join(ends)}, so there is no learning rate to"
        " recommend.",
        "Pass lower learning rates (lr_range=), lower ranks or a smaller batch, and check the loss"
        " and the data: if the value is an accuracy or a reward, yield minus the value. Stored runs"
        " are not repeated, so choose another storage= too.",
    )


# --- notes on the trials --------------------------------------------------------------------------


def what_is_unknown(
    fit: Fit, observations: Sequence[Observation], *bracketed: int | None
) -> Iterator[str]:
    """Yield a sentence for each thing that the runs leave open.

    These are: a rank at which every run diverged; a rank whose best learning rate is the lowest or
    the highest that was tried; and a loss that hardly depends on the learning rate.

    Args:
        fit: the fit of the runs.
        observations: the runs.
        bracketed: the ranks that should have been tried on both sides of their best learning rate.
    """
    lost = diverged(observations)
    ended = {run.rank for run in observations if run not in lost}
    for rank in dict.fromkeys(run.rank for run in lost if run.rank not in ended):
        yield (
            f"{rank_words(rank)}: every run diverged, so its learning rate was not measured, and"
            " may diverge too"
        )
    for rank in bracketed:
        if note := end_note(observations, rank):
            yield note
    if math.sqrt(float(fit.covariance[0, 0])) > UNDETERMINED:
        yield (
            "the data do not determine the learning rate, because the loss hardly depends on it;"
            " longer trials, a larger batch or a score on held-out data may"
        )


def _doubts(options: Options, trials: Trials) -> Iterator[str]:
    """Yield a sentence for each reason why the trials may say nothing about the learning rate."""
    if trials.spread() == 0.0 and not options.noisy:
        yield ALIKE
    changes = trials.changes()
    lowest = changes[: max(2, len(changes) // 4)]
    if 1 in lowest and -1 not in lowest:
        yield RISING
    elif 1 in changes and -1 not in changes:
        yield NONE_FELL
    if trials.scores_oppose_losses() or trials.best_score_learned_nothing():
        yield AGAINST


def _training_notes(options: Options, trials: Trials) -> Iterator[str]:
    """Yield a sentence for each way in which the trials differ from the run that they stand for."""
    if options.target > options.steps:
        sd = math.sqrt(steps_variance(options.octaves_to_target))
        yield (
            f"no trial had the run's {options.target} steps: the learning rate was measured at"
            f" {options.steps} steps, {give_or_take(sd)}"
        )
    if options.steps < FEWEST_STEPS:
        yield (
            f"trials of {options.steps} steps may mislead: below {FEWEST_STEPS} steps low learning"
            " rates look best"
        )
    if not any(run.returned for run in trials.observations()):
        yield BY_TRAINING
    warmup = trials.warmup
    if warmup > LONG_WARMUP:
        yield (
            f"the learning rate rose over {warmup:.0%} of a trial's steps, so the recipe is for"
            " runs that warm up over as large a share of their steps"
        )
    if unsteady := trials.unsteady():
        rank, seed = unsteady
        yield (
            f"train is not reproducible: two runs of {rank_words(rank)} with seed {seed} began with"
            " different values, which adds noise; draw all random numbers from trial.seed, and"
            " yield the loss from before the step"
        )


@np.errstate(all="ignore")
def tensors_of(
    trials: Trials,
    steps: int,
) -> dict[str, npt.NDArray[Any]]:
    """Return the trials as `Recipe.tensors` keeps them, one entry a trial.

    A rank of 0 is full finetuning. Curves are padded with NaN to the steps of a whole run. A run
    that was stopped early has the score NaN.
    """
    lost = diverged(trials.observations())
    rows = []
    for run in trials:
        if run.x is None:  # it ended before it had an optimizer
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
