"""What the trials of a calibration tell: its fit, its best rate so far, and its recipe. It writes
nothing.

The only parameter is log2 of the base rate in *reference coordinates*. A rate at any rank is mapped
back by the law at its prior means, so that trials at several ranks enter one fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from .._optimizers import optimizer_family
from .._printing import give_or_take
from .._types import Reference, infer_scaling
from ..errors import CalibrationError
from ..fitting import (
    TAIL,
    Fit,
    Observation,
    at_target,
    centred_law,
    fit_observations,
    prior_of,
    steps_variance,
    turn_of,
    usual_noise,
)
from ..laws import Law, Power, bound_law, checked_multiplier
from ..recipe import Z90, Recipe, agreed, constructor_settings, recipe_of
from ._constants import (
    ALIKE_ERRORS,
    APART,
    FEWEST_STEPS,
    LEAST_RANKED,
    LONG_WARMUP,
    OPPOSED,
    SAME,
    STRIDE,
    TOGETHER,
    UNDETERMINED,
    USUAL_AT,
    USUAL_LR,
)
from ._provenance import versions_used
from ._schedule import Options
from ._trials import Setting, TrialRecord, Trials, rank_words

_COLUMNS = [
    ("rank", np.int64),
    ("seed", np.int64),
    ("lr", np.float64),
    ("own_lr", np.float64),
    ("value", np.float64),
    ("diverged", np.bool_),
    ("pruned", np.bool_),
    ("steps", np.int64),
]
ALIKE = (
    "every run of a rank and seed has the same values at every rate: nothing was trained, or no"
    " rate moved a weight; see that train takes the steps of the optimizer of trial.optimizer"
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


@dataclass(frozen=True)
class Settled:
    """What the first model of a calibration settles for all trials.

    Args:
        reference: its configuration, to which rates are moved.
        full_fan_in: the fan-in that decides full finetuning.
        layers: the mean fan-in of the adapted layers, by name pattern.
    """

    reference: Reference
    full_fan_in: float
    layers: Mapping[str, float]


class Calibration:
    """One calibration, as far as its trials have come.

    Args:
        options: what it tries.
        trials: returns the trials so far.
    """

    def __init__(self, options: Options, trials: Callable[[], Trials]) -> None:
        self.options = options
        self.trials = trials
        self.settled: Settled | None = None
        self.settings: Mapping[str, Any] = {}  # of the optimizer
        # the number of observations, and their fit
        self._fit: tuple[int, Fit | None] = (-1, None)

    def settle(self, settled: Settled) -> None:
        """Set the reference, the prior for its init, and log2 of the first rate: the middle of the
        range that is given, else the suggested one, else the upper end of the family's usual rates.
        """
        self.settled = settled
        reference = settled.reference
        self.prior = prior_of(reference, self.options.ranks, settled.full_fan_in)
        if self.options.octaves is not None:
            self.start = fmean(self.options.octaves)
            return
        if self.options.suggested is not None:
            self.start = math.log2(self.options.suggested.lr)
            return
        family = optimizer_family(self.options.optimizer)
        law = bound_law(self.options.law, self.options.optimizer, {})
        multiplier = checked_multiplier(law, reference.as_factor(), USUAL_AT)
        usual = USUAL_LR.get(family, USUAL_LR["sign-like"]) * multiplier
        self.start = STRIDE + math.log2(usual)

    def known(self) -> Settled:
        """Return what the first model has settled."""
        if self.settled is None:
            raise CalibrationError(
                "No trial has built its model yet.", "Run at least one trial."
            )
        return self.settled

    @property
    def bound_law(self) -> Law:
        """The law, bound to the optimizer."""
        return bound_law(self.options.law, self.options.optimizer, self.settings)

    def centred_law(self) -> Power:
        """Return the law, bound to the optimizer, at its prior means."""
        return centred_law(self.bound_law, self.known().reference, self.prior.pivot)

    def fit(self) -> Fit | None:
        """Return the fit of the trials so far, at their steps, or None if every run diverged.

        It is computed once for each number of observations, since a study only adds to them. With
        hundreds of trials, up to a fiftieth of them wait for a common fit.
        """
        if self.settled is None:
            return None
        ended = self.trials().counted()
        waiting = len(ended) % max(1, len(ended) // TOGETHER)
        evidence = Trials(ended[: len(ended) - waiting]).evidence()
        if len(evidence) != self._fit[0]:
            self._fit = len(evidence), fit_observations(evidence, self.prior)
        return self._fit[1]

    def best(self) -> float | None:
        """Return the target's best base rate so far. None before any fit."""
        fit = self.fit()
        if fit is None:
            return None
        mean = at_target(fit, self.options.octaves_to_target).mean
        return float(2.0 ** mean[0])


# --- the recipe -----------------------------------------------------------------------------------


def calibrated_recipe(
    calibration: Calibration, source: Mapping[str, str] | None = None
) -> Recipe:
    """Return the recipe of the trials so far.

    source: see `source_of`.

    Raises:
        CalibrationError: every run failed, or all of a rank.
    """
    options = calibration.options
    trials = calibration.trials().counted()
    is_by_chance = options.noisy and options.suggested and _differ_by_chance(trials)
    measured = _suggested(calibration) if is_by_chance else _fit(calibration, trials)
    fit = at_target(measured, options.octaves_to_target)
    settled = calibration.known()
    tried = {run.rank for run in trials.observations()}
    built = [trial.built for trial in trials if trial.built]
    # of all trials, defaults included; if groups differ, those of the factors
    settings = agreed({**each, **each.get("factors' settings", {})} for each in built)
    doubts = [BY_CHANCE] if is_by_chance else _doubts(fit, trials)
    make = partial(
        recipe_of,
        law=calibration.bound_law,
        reference=settled.reference,
        name=options.name,
        scaling_rule=infer_scaling(_scalings(trials)),
        full_fan_in=settled.full_fan_in,
        layers=settled.layers,
        ranks=tuple(rank for rank in options.lora if rank in tried),
        full_seen=None in tried,
        optimizer=options.optimizer_name,
        settings=constructor_settings(settings, options.optimizer),
        steps=options.target,
        warmup=options.warmup,
        seed=options.seed,
        versions=versions_used(),
        source=source or {},
        other_rates=agreed([values.get("other rates", {}) for values in built]),
        notes=(*doubts, *_notes(calibration, trials)),
        tensors=tensors_of(trials, options.steps),
    )
    return _at_floor(make(fit), make, fit, options)


def _at_floor(
    recipe: Recipe, make: Callable[[Fit], Recipe], fit: Fit, options: Options
) -> Recipe:
    """Return the recipe, or one of the floor's rate, whose band reaches down to the trials'."""
    octaves = options.floor - math.log2(recipe.lr)
    if octaves <= 0:
        return recipe
    wider = fit.covariance + np.diag([octaves**2, 0.0, 0.0])
    raised = make(replace(fit, covariance=wider))
    note = (
        f"the best rate of the trials is {recipe.lr:.3g}, below the suggested one, which is kept:"
        f" trials of {options.steps} steps for a run of {options.target} make low rates look best"
    )
    return replace(
        raised,
        fitted_lr=2.0 ** (options.floor + raised.margin),
        notes=(*raised.notes, note),
    )


def _suggested(calibration: Calibration) -> Fit:
    """Return a fit that says no more than the suggested rate."""
    rate, prior = calibration.options.suggested, calibration.prior
    assert rate is not None
    sd = math.log2(rate.high / rate.low) / (2 * Z90)
    return Fit(
        prior=prior,
        mean=np.array([math.log2(rate.lr), 0.0, 0.0]),
        covariance=np.diag([sd**2, prior.drift_sd**2, prior.full_sd**2]),
        steepness=0.0,
        ceiling=None,
        vertices={},
    )


def _differ_by_chance(trials: Trials) -> bool:
    """Return whether the scores of the trials differ by no more than the noise of their curves
    explains. Each is the mean of a tenth of its curve.
    """
    runs = [t for t in trials if t.observation and not t.observation.stopped]
    scores = [t.observation.value for t in runs if t.observation]
    is_whole = len(runs) == len(trials) > 0
    if not is_whole or not all(map(math.isfinite, scores)):
        return False
    count = max(TAIL, len(trials[0].curve) // 10)
    noise = usual_noise([t.observation for t in runs if t.observation])
    return max(scores) - min(scores) <= ALIKE_ERRORS * noise / math.sqrt(count)


def _scalings(trials: Trials) -> dict[int, float]:
    """Return s = alpha / r of the models, by rank."""
    return {
        trial.rank: trial.built["lora_alpha"] / trial.rank
        for trial in trials
        if trial.rank is not None and trial.built
    }


def _fit(calibration: Calibration, trials: Trials) -> Fit:
    """Return the fit of the trials, or raise a `CalibrationError` that says why there is none."""
    # Stored runs are not made again.
    elsewhere = (
        " Runs that are stored are not made again: give another name or storage too."
    )
    if trials and all(trial.stopped == "memory" for trial in trials):
        raise CalibrationError(
            f"Every one of {len(trials)} runs ran out of memory.",
            f"Lower the batch or the ranks, or free memory.{elsewhere}",
        )
    if trials and all(trial.stopped for trial in trials):
        memory = any(trial.stopped == "memory" for trial in trials)
        raise CalibrationError(
            f"Every one of {len(trials)} runs {'ran out of memory or ' * memory}was pruned: train"
            " raised optuna.TrialPruned, or a pruner stopped it.",
            f"Let some runs come to their end.{elsewhere}",
        )
    calibration.known()
    fit = fit_observations(trials.evidence(), calibration.prior)
    if fit is None:
        some_pruned = len(trials.observations()) < len(trials)
        raise CalibrationError(
            f"Every one of {len(trials)} runs diverged{' or was pruned' if some_pruned else ''}.",
            "Lower the rates, or check the loss (of an accuracy or a reward yield minus it), the"
            f" data and the pruner.{elsewhere}",
        )
    for runs in trials.hopeless():
        raise CalibrationError(
            f"Every one of {runs} diverged, though other ranks train.",
            f"Check the model at that rank, or leave the rank out.{elsewhere}",
        )
    return fit


def _doubts(fit: Fit, trials: Trials) -> list[str]:
    """Return sentences on why the trials may say nothing of the rate."""
    doubts = []
    if _went_alike(trials):
        doubts.append(ALIKE)
    elif math.sqrt(float(fit.covariance[0, 0])) > UNDETERMINED:
        doubts.append(
            "the data do not determine the rate: the loss hardly depends on it"
        )
    if rising := _only_rising(trials):
        doubts.append(rising)
    if _scored_against(trials.observations()):
        doubts.append(AGAINST)
    return doubts


def _notes(calibration: Calibration, trials: Trials) -> tuple[str, ...]:
    """Return sentences on what was not tried, and on problems of the runs."""
    notes = []
    options = calibration.options
    lora = options.lora
    if len(lora) > 1 and max(lora) < APART * min(lora):
        notes.append(
            f"ranks {min(lora)} and {max(lora)} differ by less than a factor {APART}: how the"
            " rate moves with rank is uncertain"
        )
    if options.target > options.steps:
        variance = steps_variance(options.octaves_to_target)
        notes.append(
            f"{options.target} steps were not tried: the rate is that of"
            f" {options.steps}, {give_or_take(math.sqrt(variance))}"
        )
    notes += _short_notes(calibration, trials)
    unsteady = _unsteady(trials)
    if unsteady is not None:
        rank, seed = unsteady
        notes.append(
            f"train is not reproducible: two runs of {rank_words(rank)}, seed {seed}, began with"
            " different values, which adds noise; draw everything from trial.seed, and yield the"
            " loss before the step"
        )
    return tuple(notes)


def _short_notes(calibration: Calibration, trials: Trials) -> list[str]:
    """Return sentences on what makes short trials mislead."""
    notes = []
    options = calibration.options
    if options.steps < FEWEST_STEPS:
        notes.append(
            f"trials of {options.steps} steps may mislead: below {FEWEST_STEPS} low rates look best"
        )
    observations = trials.observations()
    if not any(run.returned for run in observations):
        notes.append(BY_TRAINING)
    warmup = max((trial.warmup for trial in trials), default=0.0)
    warmup = max(warmup, options.warmup or 0.0)
    if warmup > LONG_WARMUP:
        notes.append(
            f"the rate rose over {warmup:.0%} of a trial's steps: it belongs to runs that warm up"
            " for as large a share of theirs"
        )
    edge = _edge(trials.at(options.anchor))
    if edge:
        notes.append(edge)
    return notes


def _edge(trials: Trials) -> str:
    """Return a sentence if the best trial of a rank has its lowest or highest rate, else ""."""
    lost = trials.diverged()
    good = [trial for trial, _ in trials.scored() if trial.number not in lost]
    rates = trials.rates()
    if not good or len({*rates}) < 2:
        return ""
    best = min(good, key=lambda trial: trial.observation.value)  # type: ignore[union-attr]
    for edge, name, beyond in ((min, "lowest", "lower"), (max, "highest", "higher")):
        if best.x == edge(rates):
            return (
                f"the best trial has the {name} rate that was tried: the best one may be"
                f" {beyond}"
            )
    return ""


def _went_alike(trials: Iterable[TrialRecord]) -> bool:
    """Return whether all runs of each rank and seed have the same values, some at several rates."""
    settings, rates, values = set(), set(), set()
    for trial in trials:
        run = trial.observation
        if run is not None and math.isfinite(run.value):
            settings.add(trial.setting)
            rates.add((trial.setting, trial.x))
            values.add((trial.setting, run.value, *trial.curve))
    return len(values) == len(settings) < len(rates)


def _only_rising(trials: Trials) -> str:
    """Return a note if no run of the lowest quarter of the rates fell over its steps, and one rose;
    or if this holds of all rates. Where scores were returned, the curves are not minimised.
    """
    if any(run.returned for run in trials.observations()):
        return ""
    runs = [(t.x, turn_of(t.curve)) for t in trials if t.x is not None]
    turns = [turn for _, turn in sorted(runs)]
    lowest = turns[: max(2, len(turns) // 4)]
    for part, note in ((lowest, RISING), (turns, NONE_FELL)):
        if 1 in part and -1 not in part:
            return note
    return ""


def _scored_against(observations: Iterable[Observation]) -> bool:
    """Return whether the returned scores are higher where the curves end lower, in nearly all runs,
    by the rank correlation of the two.
    """
    runs = [run for run in observations if run.returned and math.isfinite(run.value)]
    if len(runs) < LEAST_RANKED:
        return False
    by_score = np.argsort(np.argsort([run.value for run in runs]))
    by_curve = np.argsort(np.argsort([run.tail for run in runs]))
    return float(np.corrcoef(by_score, by_curve)[0, 1]) <= OPPOSED


def _unsteady(trials: Iterable[TrialRecord]) -> Setting | None:
    """Return a rank and seed with two runs whose first values differ, although these do not depend
    on the rate.
    """
    first: dict[Setting, float] = {}
    for trial in trials:
        if not trial.curve:
            continue
        start = first.setdefault(trial.setting, trial.curve[0])
        if not math.isclose(start, trial.curve[0], rel_tol=SAME, abs_tol=1e-9):
            return trial.setting
    return None


@np.errstate(all="ignore")
def tensors_of(trials: Trials, steps: int) -> dict[str, npt.NDArray[Any]]:
    """Return `Recipe.tensors`: each trial's rank (0: full finetuning), seed, rate, score, end,
    steps and curve.

    Curves are padded with NaN, to the steps of a whole run. A pruned run has the score NaN.
    """
    lost = trials.diverged()
    rows = []
    curves = []
    for trial in trials.counted():
        if trial.x is None:
            continue
        run = trial.observation
        curve = trial.curve
        row = (
            trial.rank or 0,
            trial.seed,
            2.0**trial.x,
            trial.own_lr,  # None becomes NaN
            None if run is None else run.value,
            trial.number in lost,
            run is None,
            len(curve),
        )
        rows.append(row)
        curves.append([*curve, *[math.nan] * (steps - len(curve))])
    table = np.array(rows, _COLUMNS)
    arrays = {name: table[name].copy() for name, _ in _COLUMNS}
    return {**arrays, "curve": np.array(curves, np.float32)}
