"""This module estimates the best learning rate from the finished trials of a
calibration, and stores the estimate in a recipe. This module neither runs trials nor
writes to the storage of the calibration.

The search varies a single parameter of a trial: x, which is log2 of the base learning
rate at the *reference configuration*. If the LoRA rank of a trial differs from the
reference configuration, the scaling law multiplies the base learning rate by a factor.
The parameters of the scaling law are set to the means of their priors. Trials of all
LoRA ranks can therefore be compared at the same x, and one curve fit covers all trials.
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

# The notes in DOUBTS mean that the trials may not measure the learning rate at all. They
# become part of the recipe, and the study warns about them as well.
ALIKE = (
    "all runs with the same rank and seed have the same value, whatever their learning rate, so"
    " training did not change the model; check that train() calls step() of the optimizer that"
    " trial.optimizer() returned"
)
RISING = (
    "at the lowest learning rates the value only increased, although calibrate() minimises the"
    " value: yield minus the value if it is an accuracy or a reward, or pass a lower range of"
    " learning rates as lr_range= if it is a loss"
)
NONE_FELL = (
    "no run reduced the value by more than its noise, and at least one run increased the value:"
    " yield minus the value if it is an accuracy or a reward, or pass other learning rates as"
    " lr_range= if it is a loss"
)
AGAINST = (
    "the runs with the best scores have the worst training losses, and calibrate() minimises the"
    " score: if the score is an accuracy or a reward, return minus the score"
)
DOUBTS = (ALIKE, RISING, AGAINST)
BY_TRAINING = (
    "each trial was scored by the mean of its last training losses; a loss on held-out data, which"
    " train() can return, would be more reliable"
)
BY_CHANCE = (
    "the differences between the trials are no larger than chance would make them, so the recipe"
    " uses the suggested learning rate instead of the measured one"
)
_PACKAGES = ("rankaware-optim", "torch", "optuna")
_IF_LOADED = ("peft", "transformers", "trl", "accelerate", "lightning", "diffusers")
_ENDS = {"memory": "ran out of memory", "pruned": "were stopped early"}


class Calibration:
    """Estimates the best learning rate from the trials of one calibration.

    Args:
        options: the options of the calibration.
        build: what the first trial built. Its model is the reference configuration.
        trials: a function that returns the trials so far.
    """

    def __init__(
        self, options: Options, build: Build, trials: Callable[[], Trials]
    ) -> None:
        self.options = options
        self.build = build
        self.trials = trials
        self.prior = prior_of(build.reference, options.ranks, build.full_fan_in)
        self.start = first_rate(options, build.reference)
        # The number of observations at the last fit, and that fit. -1 never matches, so the
        # first call computes a fit even if there are no observations.
        self._fit: tuple[int, Fit | None] = (-1, None)

    def law(self, settings: Mapping[str, Any]) -> Power:
        """Return the scaling law that applies to the trials' optimizer with its
        settings.

        The parameters of the scaling law are set to the means of their priors.
        """
        law = self.options.law.bind(self.options.optimizer, settings)
        return centred_law(law, self.build.reference, self.prior.pivot)

    def fit(self) -> Fit | None:
        """Return a fit of the loss against the learning rate of the trials so far, or
        None if every trial diverged.

        This fit predicts the best learning rate for training runs that are as long as
        the trials. The trials are only fitted again if there are new ones, because a
        study never removes a trial.
        """
        evidence = self.trials().evidence()
        if len(evidence) != self._fit[0]:
            self._fit = len(evidence), fit_observations(evidence, self.prior)
        return self._fit[1]


def first_rate(options: Options, reference: Reference) -> float:
    """Return log2 of the learning rate of the first trial.

    If the user passed `lr_range`, the search starts in the middle of this range of
    learning rates. Without `lr_range`, the search starts at the learning rate that
    `suggest_lr` suggests for the model. If there is no suggested learning rate, the
    search starts at the upper end of the usual learning rates of optimizers such as the
    user's.
    """
    if options.octaves is not None:
        return fmean(options.octaves)
    if options.suggested is not None:
        return math.log2(options.suggested.lr)
    family = optimizer_family(options.optimizer)
    law = options.law.bind(options.optimizer, {})
    multiplier = checked_multiplier(law, reference.as_factor(), USUAL_AT)
    usual = USUAL_LR.get(family, USUAL_LR["sign-like"]) * multiplier
    # Start too high rather than too low: a run that diverges ends early and costs little.
    return STRIDE + math.log2(usual)


# --- the recipe -----------------------------------------------------------------------------------


def calibrated_recipe(
    calibration: Calibration, source: Mapping[str, str] | None = None
) -> Recipe:
    """Compute a recipe with the best learning rate from the trials that have ended so
    far.

    Args:
        calibration: the calibration and its trials.
        source: the name of the user's training function, as {"train": name}.

    Raises:
        CalibrationError: every run diverged, was stopped early or ran out of memory.
    """
    options = calibration.options
    build = calibration.build
    trials = calibration.trials().counted()
    # Fit again instead of using `calibration.fit()`: another worker may add a trial between
    # two reads, and the fit, the notes and the tensors must describe the same trials.
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
    """Convert a fit of short trials into a fit that applies to the longer run that the
    user plans.

    The fit is adjusted before this conversion if the search had only a few trials, or
    if the recipe uses the learning rate from `suggest_lr`.

    Args:
        fit: the fit of the trials.
        evidence: the observations that were fitted.
        calibration: the calibration that the trials belong to.
        by_suggestion: whether the suggested learning rate replaces the fitted one.
    """
    options = calibration.options
    if by_suggestion and options.suggested is not None:
        fit = _fit_of_rate(fit, options.suggested)
    elif is_few(options):
        fit = read_few(fit, calibration.build.reference.rank, evidence)
    # The order matters: a longer target run widens the interval, and only then is the
    # interval capped.
    fit = at_target(fit, options.octaves_to_target)
    return capped(fit) if is_few(options) else fit


def versions_used() -> dict[str, str]:
    """Return the versions of Python, this package, torch and Optuna.

    The result also contains the versions of training libraries, such as transformers,
    that have been imported.
    """
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    loaded = [name for name in _IF_LOADED if name in sys.modules]
    for name in (*_PACKAGES, *loaded):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _why_suggested(options: Options, trials: Trials, best: float) -> str:
    """Explain why the recipe uses the learning rate that `suggest_lr` suggests, instead
    of the best learning rate of the trials.

    Return "" if the recipe uses the best learning rate of the trials.
    """
    if options.suggested is None:
        return ""
    if options.noisy and trials.differ_by_chance():
        return BY_CHANCE
    # The search did not go below the floor, but the optimum of the fit may lie there.
    if best >= options.floor:
        return ""
    return (
        f"the best learning rate in the trials was {2.0**best:.3g}, which is lower than the"
        f" suggested one; the recipe uses the suggested learning rate, because trials of"
        f" {options.steps} steps favour learning rates that are too low for a run of"
        f" {options.target} steps"
    )


def _fit_of_rate(fit: Fit, rate: Rate) -> Fit:
    """Return a fit whose best learning rate and 90 % interval are the ones that
    `suggest_lr` suggests.
    """
    assert rate.low is not None  # a suggestion has both ends
    assert rate.high is not None
    # The 90 % interval extends Z90 standard deviations to each side.
    sd = math.log2(rate.high / rate.low) / (2 * Z90)
    # The three parameters are x, the drift with rank and the distance to full finetuning.
    # A suggestion determines only the first parameter, so the other two have their priors.
    return replace(
        fit,
        mean=np.array([math.log2(rate.lr), 0.0, 0.0]),
        covariance=np.diag([sd**2, fit.prior.drift_sd**2, fit.prior.full_sd**2]),
        steepness=0.0,
        ceiling=None,
    )


def refuse_ends(trials: Trials) -> NoReturn:
    """Raise a `CalibrationError`, because no trial has produced a loss or score.

    The error message lists how the trials of the calibration ended.
    """
    count = len(trials)
    if all(run.end == "memory" for run in trials):
        raise CalibrationError(
            f"No learning rate can be recommended, because all {count} trials ran out of memory.",
            "Use lower ranks or a smaller batch. If you passed storage=, also choose a new one,"
            " because stored trials are not repeated.",
        )
    diverged_or_stopped = " or ".join(
        sorted({_ENDS.get(run.end, "diverged") for run in trials})
    )
    raise CalibrationError(
        f"No learning rate can be recommended, because all {count} trials {diverged_or_stopped}.",
        "Pass lower learning rates as lr_range=(low, high), and check the data and the loss. If"
        " train() yields an accuracy or a reward, yield minus this value instead. If you passed"
        " storage=, also choose a new one, because stored trials are not repeated.",
    )


# --- notes on the trials --------------------------------------------------------------------------


def what_is_unknown(
    fit: Fit, observations: Sequence[Observation], *bracketed: int | None
) -> Iterator[str]:
    """Yield a note for each result of the calibration that its trials could not
    determine.

    A note is yielded for every LoRA rank at which all trials diverged. There is also a
    note if the best learning rate at a rank was the lowest or highest that was tried.
    The last note warns the user if the loss hardly depends on the learning rate.

    Args:
        fit: the fit of the runs.
        observations: the runs' results.
        bracketed: the ranks that should have been tried on both sides of their best learning rate.
    """
    lost = diverged(observations)
    ended = {run.rank for run in observations if run not in lost}
    for rank in dict.fromkeys(run.rank for run in lost if run.rank not in ended):
        yield (
            f"{rank_words(rank)}: every run diverged, so the recipe's learning rate for it was not"
            " measured and may diverge too"
        )
    for rank in bracketed:
        if note := end_note(observations, rank):
            yield note
    if math.sqrt(float(fit.covariance[0, 0])) > UNDETERMINED:
        yield (
            "the best learning rate is uncertain, because the loss hardly depends on it; longer"
            " trials, a larger batch or a score on held-out data may help"
        )


def _doubts(options: Options, trials: Trials) -> Iterator[str]:
    """Yield a note for every sign that the losses or scores of the trials do not show
    which learning rate is best.
    """
    if trials.spread() == 0.0 and not options.noisy:
        yield ALIKE
    # Look at the quarter of the runs with the lowest learning rates, but at least at two runs.
    # At a low learning rate a loss falls, even if slowly. If the value rises there, it should
    # probably be maximised.
    changes = trials.changes()
    lowest = changes[: max(2, len(changes) // 4)]
    if 1 in lowest and -1 not in lowest:
        yield RISING
    elif 1 in changes and -1 not in changes:
        yield NONE_FELL
    if trials.scores_oppose_losses() or trials.best_score_learned_nothing():
        yield AGAINST


def _training_notes(options: Options, trials: Trials) -> Iterator[str]:
    """Yield notes on how the trials were trained, for example if they were shorter than
    the run that the user plans.
    """
    if options.target > options.steps:
        sd = math.sqrt(steps_variance(options.octaves_to_target))
        yield (
            f"the run has {options.target} steps, but the learning rate was measured in trials of"
            f" {options.steps} steps: {give_or_take(sd)}"
        )
    if options.steps < FEWEST_STEPS:
        yield (
            f"trials of {options.steps} steps can be misleading: trials shorter than"
            f" {FEWEST_STEPS} steps favour learning rates that are too low"
        )
    if not any(run.returned for run in trials.observations()):
        yield BY_TRAINING
    warmup = trials.warmup
    if warmup > LONG_WARMUP:
        yield (
            f"the learning rate increased over {warmup:.0%} of a trial's steps, so the recipe is"
            f" for runs that also warm up for {warmup:.0%} of their steps"
        )
    if unsteady := trials.unsteady():
        rank, seed = unsteady
        yield (
            f"train() is not reproducible: two runs of {rank_words(rank)} with seed {seed} started"
            " with different values, which adds noise; seed all random numbers with trial.seed,"
            " and yield the loss that was computed before the optimizer's step"
        )


@np.errstate(all="ignore")
def tensors_of(
    trials: Trials,
    steps: int,
) -> dict[str, npt.NDArray[Any]]:
    """Convert the trials of a calibration to arrays with one entry per trial.
    `Recipe.tensors` stores these arrays.

    Rank 0 means full finetuning. If a trial ended early, its loss curve is padded with
    NaN to the full number of steps. If a trial was stopped early, its score in the
    array is NaN.
    """
    lost = diverged(trials.observations())
    rows = []
    for run in trials:
        if run.x is None:  # the run ended before it had an optimizer
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
