"""One calibration. Optuna stores its trials, and this module interprets them.

The only parameter is log2 of the base rate in *reference coordinates*. A rate at any rank is mapped
back by the law at its prior means, so that trials at several ranks enter one fit. All that a
resumed study needs is in its attributes: the reference, the range, and every trial's observation,
curve and scaling.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import optuna

from .._optimizers import optimizer_family
from .._types import Reference, Survey
from ..errors import CalibrationError
from ..fitting import (
    Fit,
    at_target,
    centred_law,
    fit_observations,
    prior_of,
)
from ..laws import Law, Power, bound_law, checked_multiplier
from ..recipe import differences
from ._liveness import Interrupts
from ._provenance import (
    Code,
    check_comparable,
    check_whole,
    layers_of,
    made_with,
    refuse,
    shape_of,
    warn_of_code,
)
from ._schedule import Options
from ._storage import close_storage, open_storage, quiet, storage_errors
from ._trials import TrialRecord, Trials

# A usual rate by optimizer family, per step, and its configuration. For sign-like optimizers it is
# the median best AdamW rate at rank 16, alpha 32 over 18 published language models. The others are
# customary multiples of it.
_USUAL_AT = Reference(rank=16, alpha=32, fan_in=4096)
_USUAL_LR = {
    "sign-like": 2.0**-11.8,
    "gradient-like": 2.0**-4,
    "spectral": 2.0**-8,
    "relative-scale": 2.0**-8,
    "floored-scale": 2.0**-8,
}
# octaves above the usual rate for the first run; a run too high stops early and shows the cliff
_ABOVE = 2.0
_TOGETHER = 50  # with k times this many trials, fits are made after every k-th trial


class Calibration:
    """One calibration. `reference`, `prior` and the range are set when the first model is built.

    Args:
        options: its optimizer, law, schedule and target.
        code: the training loop's code.
    """

    def __init__(self, options: Options, code: Code | None = None) -> None:
        self.options = options
        self.schedule = options.schedule
        self.code = code or Code({}, {}, ())
        # the configuration to which rates are moved
        self.reference: Reference | None = None
        self.settings: Mapping[str, Any] = {}  # of the optimizer
        self.layers: Mapping[str, float] = {}
        self.storage: Any = None
        self._opened: optuna.storages.BaseStorage | None = None
        self._ended: dict[int, TrialRecord] = {}
        # the number of observations, and their fit
        self._fit: tuple[int, Fit | None] = (-1, None)

    # --- the study --------------------------------------------------------------------------------

    def open(self, sampler: Any, pruner: Any, storage: Any) -> None:
        """Create the Optuna study, or continue the stored one of this name."""
        self.storage = storage
        name = self.options.name
        self._made_with = made_with(self.options, self.code)
        with self.guard():
            opened = open_storage(storage)
            self._opened = opened if isinstance(storage, (str, os.PathLike)) else None
            if name in optuna.get_all_study_names(opened):
                stored = optuna.load_study(study_name=name, storage=opened)
                check_whole(stored, self.options.law)
            with quiet():
                self.study = optuna.create_study(
                    study_name=name,
                    storage=opened,
                    sampler=sampler,
                    pruner=pruner,
                    load_if_exists=True,
                )
            self._check_stored()
            self.recall()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Guard reads and writes of the storage. Its errors become `CalibrationError`, and Ctrl-C
        raises afterwards.
        """
        with Interrupts(once=True) as self._interrupts, storage_errors(self.storage):
            yield

    def pause(self, seconds: float) -> None:
        """Wait inside the guard. Ctrl-C raises at once."""
        with self._interrupts.let_in():
            time.sleep(seconds)

    def close(self) -> None:
        """Release what was opened here: a database's connections, a journal's lock."""
        if self._opened is not None:
            with self.guard():
                close_storage(self._opened)

    def _check_stored(self) -> None:
        """Raise if the trials of a stored study cannot be compared with new ones. Warn if they may
        differ.
        """
        # A worker that starts at the same time writes this before its first trial, so trials are
        # read before it.
        trials = self.trials()
        stored = self.study.user_attrs.get("made_with", {"schema": None})
        if trials:
            check_comparable(self.options.name, stored, self._made_with)
        if trials.counted():
            warn_of_code(self.options.name, stored, self._made_with, "was made with")
        self.study.set_user_attr("made_with", self._made_with)

    def compare(self, number: int, rank: int | None, built: Mapping[str, Any]) -> None:
        """Raise if a trial's model or settings differ from those of an earlier one of its rank."""
        reference = self.settled()
        before = shape_of(reference) if reference.rank == rank else {}
        for trial in self.trials().at(rank):
            if trial.built and trial.number < number:
                before = trial.built
                break
        refuse(self.options.name, differences(before, built))

    def recall(self) -> None:
        """Read what the first trial of this or another worker settled. Warn if another worker runs
        different code.
        """
        stored = self.study.user_attrs
        made = stored.get("made_with", {})
        warn_of_code(
            self.options.name, made, self._made_with, "is shared with a worker of"
        )
        self.settings = stored.get("settings", self.settings)
        self.layers = stored.get("layers", self.layers)
        if self.reference is None and "reference" in stored:
            self.settle(Reference(**stored["reference"]), stored["full_fan_in"])

    def trials(self) -> Trials:
        """Return every trial so far, of all workers. Finished trials do not change, so they are
        read once.
        """
        trials = []
        for stored in self.study.get_trials(deepcopy=False):
            trial = self._ended.get(stored.number) or TrialRecord.read(stored)
            if trial.state.is_finished():
                self._ended[trial.number] = trial
            trials.append(trial)
        return Trials(trials)

    # --- the search -------------------------------------------------------------------------------

    def learn(self, built: Reference, survey: Survey) -> None:
        """Set the first model's configuration as the reference, and store it."""
        if self.reference is not None:
            return
        reference = replace(built, batch=self.options.batch)
        self.settle(reference, survey.full_width(built.init))
        self.study.set_user_attr("full_fan_in", self.full_fan_in)
        self.layers = layers_of(survey)
        self.study.set_user_attr("layers", self.layers)
        # written last: its readers need the width
        self.study.set_user_attr("reference", asdict(reference))

    def settle(self, reference: Reference, full_fan_in: float) -> None:
        """Set the reference, the prior for its init, and log2 of a first guess, which is the upper
        end of the family's usual rates.
        """
        self.reference = reference
        self.full_fan_in = full_fan_in
        self.prior = prior_of(reference, self.schedule.ranks, full_fan_in)
        family = optimizer_family(self.options.optimizer)
        multiplier = checked_multiplier(
            bound_law(self.options.law, self.options.optimizer, {}),
            reference.as_factor(),
            _USUAL_AT,
        )
        usual = _USUAL_LR.get(family, _USUAL_LR["sign-like"]) * multiplier
        low, high = self.options.lr_range or (-math.inf, math.inf)
        self.start = min(max(_ABOVE + math.log2(usual), low), high)

    def settled(self) -> Reference:
        if self.reference is None:
            raise CalibrationError(
                "No trial has built its model yet.", "Run at least one trial."
            )
        return self.reference

    @property
    def bound_law(self) -> Law:
        """The law, bound to the optimizer."""
        return bound_law(self.options.law, self.options.optimizer, self.settings)

    def centred_law(self) -> Power:
        """Return the law, bound to the optimizer, at its prior means."""
        return centred_law(self.bound_law, self.settled(), self.prior.pivot)

    # --- the fit ----------------------------------------------------------------------------------

    def fit(self) -> Fit | None:
        """Return the fit of the trials so far, at their steps, or None if every run diverged.

        It is computed once for each number of observations, since a study only adds to them. With
        hundreds of trials, up to a fiftieth of them wait for a common fit.
        """
        if self.reference is None:
            return None
        ended = self.trials().counted()
        waiting = len(ended) % max(1, len(ended) // _TOGETHER)
        evidence = Trials(ended[: len(ended) - waiting]).evidence()
        if len(evidence) != self._fit[0]:
            self._fit = len(evidence), fit_observations(evidence, self.prior)
        return self._fit[1]

    def target_fit(self) -> Fit | None:
        """Return the fit of the trials so far, at the target's steps."""
        fit = self.fit()
        return None if fit is None else at_target(fit, self.options.octaves_to_target)

    def best(self) -> float | None:
        """Return the target's best base rate so far. None before any fit."""
        fit = self.target_fit()
        return None if fit is None else 2.0 ** float(fit.mean[0])
