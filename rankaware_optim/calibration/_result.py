"""The result of a calibration: the recipe of its trials, with what they do not determine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .._optimizers import defaults_of
from .._printing import give_or_take
from .._types import infer_scaling
from ..errors import CalibrationError
from ..fitting import Fit, at_target, fit_observations, steps_variance
from ..recipe import Recipe, agreed, constructor_settings, recipe_of
from ._calibration import Calibration
from ._constants import APART, SAME, UNDETERMINED
from ._provenance import settings_in, versions_used
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
    fit = at_target(_fit(calibration, trials), options.octaves_to_target)
    settled = calibration.known()
    tried = {run.rank for run in trials.observations()}
    built = [trial.built for trial in trials if trial.built]
    # settings common to all trials, defaults included
    names = {**defaults_of(options.optimizer), **calibration.settings}
    settings = agreed(settings_in(values, names) for values in built)
    return recipe_of(
        fit,
        calibration.bound_law,
        settled.reference,
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
        notes=_notes(calibration, fit, trials),
        tensors=tensors_of(trials, options.steps),
    )


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
    calibration.known()
    fit = fit_observations(trials.evidence(), calibration.prior)
    if fit is None:
        some_pruned = len(trials.observations()) < len(trials)
        raise CalibrationError(
            f"Every one of {len(trials)} runs diverged{' or was pruned' if some_pruned else ''}.",
            f"Lower the rates, or check the loss, the data and the pruner.{elsewhere}",
        )
    for runs in trials.hopeless():
        raise CalibrationError(
            f"Every one of {runs} diverged, though other ranks train.",
            f"Check the model at that rank, or leave the rank out.{elsewhere}",
        )
    return fit


def _notes(calibration: Calibration, fit: Fit, trials: Trials) -> tuple[str, ...]:
    """Return sentences on what the data do not determine and on problems of the runs."""
    notes = []
    options = calibration.options
    lora = options.lora
    if len(lora) > 1 and max(lora) < APART * min(lora):
        notes.append(
            f"ranks {min(lora)} and {max(lora)} differ by less than a factor 16: the drift is"
            " uncertain"
        )
    if _went_alike(trials):
        notes.append(ALIKE)
    elif math.sqrt(float(fit.covariance[0, 0])) > UNDETERMINED:
        notes.append(
            "the data do not determine the rate: the loss hardly depends on it"
        )
    if options.target > options.steps:
        variance = steps_variance(options.octaves_to_target)
        notes.append(
            f"{options.target} steps were not tried: the rate is that of"
            f" {options.steps}, {give_or_take(math.sqrt(variance))}"
        )
    unsteady = _unsteady(trials)
    if unsteady is not None:
        rank, seed = unsteady
        notes.append(
            f"train is not reproducible: two runs of {rank_words(rank)}, seed {seed}, began with"
            " different values, which adds noise; draw everything from trial.seed, and yield the"
            " loss before the step"
        )
    return tuple(notes)


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
