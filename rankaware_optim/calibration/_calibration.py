"""What the trials of a calibration tell: its fit, its best rate so far, and its recipe. It writes
nothing.

The only parameter is log2 of the base rate in *reference coordinates*. A rate at any rank is mapped
back by the law at its prior means, so that trials at several ranks enter one fit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from .._optimizers import optimizer_family
from .._printing import give_or_take
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import (
    TAIL,
    Fit,
    at_target,
    centred_law,
    fit_observations,
    prior_of,
    steps_variance,
    turn_of,
    usual_noise,
)
from ..laws import Power, bound_law, checked_multiplier
from ..recipe import Z90, Recipe, agreed, constructor_settings, infer_scaling, recipe_of
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
from ._schedule import Options
from ._trials import Setting, Trials, rank_words

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
_PACKAGES = ("rankaware-optim", "torch", "optuna")
_IF_LOADED = ("peft", "transformers", "trl", "accelerate", "lightning", "diffusers")
_ENDS = {"memory": "ran out of memory", "pruned": "was pruned"}


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
        settled: what its first model settled.
        trials: returns the trials so far.
    """

    def __init__(
        self, options: Options, settled: Settled, trials: Callable[[], Trials]
    ) -> None:
        self.options = options
        self.settled = settled
        self.trials = trials
        self.prior = prior_of(settled.reference, options.ranks, settled.full_fan_in)
        self.start = first_rate(options, settled.reference)
        # the number of observations, and their fit
        self._fit: tuple[int, Fit | None] = (-1, None)

    def law(self, settings: Mapping[str, Any]) -> Power:
        """Return the law at its prior means, for an optimizer of these settings."""
        law = bound_law(self.options.law, self.options.optimizer, settings)
        return centred_law(law, self.settled.reference, self.prior.pivot)

    def fit(self) -> Fit | None:
        """Return the fit of the trials so far, at their steps, or None if every run diverged.

        It is computed once for each number of observations, since a study only adds to them. With
        hundreds of trials, up to a fiftieth of them wait for a common fit.
        """
        ended = self.trials().counted()
        waiting = len(ended) % max(1, len(ended) // TOGETHER)
        evidence = Trials(ended[: len(ended) - waiting]).evidence()
        if len(evidence) != self._fit[0]:
            self._fit = len(evidence), fit_observations(evidence, self.prior)
        return self._fit[1]

    def best(self) -> float | None:
        """Return the target's best base rate so far. None before any fit."""
        fit = self.fit()
        return None if fit is None else float(2.0 ** fit.mean[0])


def first_rate(options: Options, reference: Reference) -> float:
    """Return log2 of the first rate: the middle of the range that is given, else the suggested one,
    else the upper end of the family's usual rates.
    """
    if options.octaves is not None:
        return fmean(options.octaves)
    if options.suggested is not None:
        return math.log2(options.suggested.lr)
    family = optimizer_family(options.optimizer)
    law = bound_law(options.law, options.optimizer, {})
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
        CalibrationError: every run failed, or all of a rank.
    """
    options, settled = calibration.options, calibration.settled
    trials = calibration.trials().counted()
    is_by_chance = options.noisy and options.suggested and _differ_by_chance(trials)
    measured = _suggested(calibration) if is_by_chance else _fit(calibration, trials)
    fit = at_target(measured, options.octaves_to_target)
    doubts = [BY_CHANCE] if is_by_chance else _doubts(fit, trials)
    tried = {run.rank for run in trials.scored()}
    built = [run.built for run in trials if run.built]
    settings = _settings_in_force(built)
    make = partial(
        recipe_of,
        law=bound_law(options.law, options.optimizer, settings),
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
        other_rates=agreed(values.get("other rates", {}) for values in built),
        notes=(*doubts, *_notes(options, trials), *_training_notes(options, trials)),
        tensors=tensors_of(trials, options.steps),
    )
    return _at_floor(make, fit, options)


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


def _settings_in_force(built: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of all trials, defaults included; if groups differ, of the factors."""
    return agreed({**each, **each.get("factors' settings", {})} for each in built)


def _at_floor(make: Callable[[Fit], Recipe], fit: Fit, options: Options) -> Recipe:
    """Return the recipe, or one of the floor's rate, whose band reaches down to the trials'."""
    recipe = make(fit)
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
    runs = trials.observations()
    scores = [run.value for run in runs]
    if not 0 < len(runs) == len(trials) or not all(map(math.isfinite, scores)):
        return False
    count = max(TAIL, len(trials[0].curve) // 10)
    noise = usual_noise(runs)
    return max(scores) - min(scores) <= ALIKE_ERRORS * noise / math.sqrt(count)


def _scalings(trials: Trials) -> dict[int, float]:
    """Return s = alpha / r of the models, by rank."""
    built = [(run.rank, run.built) for run in trials]
    return {rank: at["lora_alpha"] / rank for rank, at in built if rank and at}


def _fit(calibration: Calibration, trials: Trials) -> Fit:
    """Return the fit of the trials, or raise a `CalibrationError` that says why there is none."""
    fit = fit_observations(trials.evidence(), calibration.prior)
    check_ends(trials, fit)
    assert fit is not None
    return fit


def check_ends(trials: Trials, fit: Fit | None = None) -> None:
    """Raise a `CalibrationError` if no run tells of the rate, or of that of a rank."""
    useless = [f"{runs} diverged" for runs in trials.hopeless()]
    if not useless and fit is None:
        ends = sorted({_ENDS.get(run.end, "diverged") for run in trials})
        useless = [f"{len(trials)} runs {' or '.join(ends)}"]
    for runs in useless:
        raise CalibrationError(
            f"Every one of {runs}.",
            "Lower the rates, the ranks or the batch, or check the loss (of an accuracy or a reward"
            " yield minus it), the data and the pruner. Runs that are stored are not made again:"
            " give another name or storage too.",
        )


def _doubts(fit: Fit, trials: Trials) -> list[str]:
    """Return sentences on why the trials may say nothing of the rate."""
    doubts = []
    if _went_alike(trials):
        doubts.append(ALIKE)
    elif math.sqrt(float(fit.covariance[0, 0])) > UNDETERMINED:
        doubts.append(
            "the data do not determine the rate: the loss hardly depends on it"
        )
    returned = [run for run in trials.observations() if run.returned]
    if not returned:
        doubts += _only_rising(trials)
    finite = [run for run in returned if math.isfinite(run.value)]
    if len(finite) >= LEAST_RANKED:
        # the rank correlation of the returned scores and the curves' ends
        by_score = np.argsort(np.argsort([run.value for run in finite]))
        by_curve = np.argsort(np.argsort([run.tail for run in finite]))
        if float(np.corrcoef(by_score, by_curve)[0, 1]) <= OPPOSED:
            doubts.append(AGAINST)
    return doubts


def _notes(options: Options, trials: Trials) -> list[str]:
    """Return sentences on what was not tried, and on runs that differ by themselves."""
    notes = []
    lora = options.lora
    if len(lora) > 1 and max(lora) < APART * min(lora):
        notes.append(
            f"ranks {min(lora)} and {max(lora)} differ by less than a factor {APART}: how the"
            " rate moves with rank is uncertain"
        )
    if options.target > options.steps:
        sd = math.sqrt(steps_variance(options.octaves_to_target))
        notes.append(
            f"{options.target} steps were not tried: the rate is that of"
            f" {options.steps}, {give_or_take(sd)}"
        )
    return notes


def _training_notes(options: Options, trials: Trials) -> list[str]:
    """Return sentences on what makes short trials mislead."""
    notes = []
    if options.steps < FEWEST_STEPS:
        notes.append(
            f"trials of {options.steps} steps may mislead: below {FEWEST_STEPS} low rates look best"
        )
    if not any(run.returned for run in trials.observations()):
        notes.append(BY_TRAINING)
    warmup = max([options.warmup or 0.0, *(run.warmup for run in trials)])
    if warmup > LONG_WARMUP:
        notes.append(
            f"the rate rose over {warmup:.0%} of a trial's steps: it belongs to runs that warm up"
            " for as large a share of theirs"
        )
    return [*notes, *_edge(trials.at(options.anchor)), *_unsteady(trials)]


def _edge(trials: Trials) -> list[str]:
    """Return a sentence if the best trial of a rank has its lowest or highest rate."""
    lost, rates = trials.diverged(), trials.rates()
    good = [run for run in trials.scored() if run.number not in lost]
    if not good or min(rates) == max(rates):
        return []
    best = min(good, key=lambda run: run.observation.value)  # type: ignore[union-attr]
    edges = {
        min(rates): "lowest rate that was tried: the best one may be lower",
        max(rates): "highest rate that was tried: the best one may be higher",
    }
    return [
        f"the best trial has the {edge}" for x, edge in edges.items() if x == best.x
    ]


def _unsteady(trials: Trials) -> list[str]:
    """Return a sentence if two runs of a rank and seed have other first values, although these do
    not depend on the rate.
    """
    first: dict[Setting, float] = {}
    for run in trials:
        if not run.curve:
            continue
        start = first.setdefault(run.setting, run.curve[0])
        if not math.isclose(start, run.curve[0], rel_tol=SAME, abs_tol=1e-9):
            return [
                f"train is not reproducible: two runs of {rank_words(run.rank)}, seed {run.seed},"
                " began with different values, which adds noise; draw everything from trial.seed,"
                " and yield the loss before the step"
            ]
    return []


def _went_alike(trials: Trials) -> bool:
    """Return whether all runs of each rank and seed have the same values, some at several rates."""
    settings, rates, values = set(), set(), set()
    for run in trials.scored():
        assert run.observation is not None
        if math.isfinite(run.observation.value):
            settings.add(run.setting)
            rates.add((run.setting, run.x))
            values.add((run.setting, run.observation.value, *run.curve))
    return len(values) == len(settings) < len(rates)


def _only_rising(trials: Trials) -> list[str]:
    """Return a note if no run of the lowest quarter of the rates fell over its steps, and one rose;
    or if this holds of all rates.
    """
    runs = [(run.x, turn_of(run.curve)) for run in trials if run.x is not None]
    turns = [turn for _, turn in sorted(runs)]
    lowest = turns[: max(2, len(turns) // 4)]
    for part, note in ((lowest, RISING), (turns, NONE_FELL)):
        if 1 in part and -1 not in part:
            return [note]
    return []


@np.errstate(all="ignore")
def tensors_of(trials: Trials, steps: int) -> dict[str, npt.NDArray[Any]]:
    """Return `Recipe.tensors`: each trial's rank (0: full finetuning), seed, rate, score, end,
    steps and curve.

    Curves are padded with NaN, to the steps of a whole run. A pruned run has the score NaN.
    """
    lost = trials.diverged()
    rows = []
    curves = []
    for run in trials:
        if run.x is None:
            continue
        seen = run.observation
        row = (
            run.rank or 0,
            run.seed,
            2.0**run.x,
            run.own_lr,  # None becomes NaN
            None if seen is None else seen.value,
            run.number in lost,
            seen is None,
            len(run.curve),
        )
        rows.append(row)
        curves.append([*run.curve, *[math.nan] * (steps - len(run.curve))])
    table = np.array(rows, _COLUMNS)
    arrays = {name: table[name].copy() for name, _ in _COLUMNS}
    return {**arrays, "curve": np.array(curves, np.float32)}
