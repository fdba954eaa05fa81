"""The study behind a calibration. Optuna stores the trials, and this module interprets them.

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
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import optuna
from torch.optim import Optimizer

from .._checks import is_positive, is_within
from .._optimizers import defaults_of, optimizer_family
from .._types import Reference, Survey, infer_scaling
from .._warn import warn
from ..errors import CalibrationError
from ..fitting import (
    Carry,
    Fit,
    Observation,
    Prior,
    all_rose,
    carry_of,
    centred_law,
    diverged,
    fit_observations,
    prior_of,
)
from ..laws import Law, Power, bound_law, checked_multiplier
from ..recipe import Z90, Horizon, Recipe, agreed, differences, recipe_of
from ._code import Code, versions_used
from ._comparison import SAME_RATE, law_values, settings_in
from ._optuna import close_storage, quiet
from ._pruner import PairedPruner
from ._sampler import BracketSampler
from ._signals import Interrupts
from ._storage import open_storage, storage_errors
from ._trials import SCHEMA, TrialRecord, Trials, is_flat, is_typed

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
_HALF_RANGE = 4.0  # octaves on either side of the first guess
_WIDEN = 2.0  # octaves by which an edge moves if the best rate is there
_EDGE = 1.0  # octaves from an edge that count as being there
# octaves: with a larger standard deviation of the base rate the data hardly determine it
_UNDETERMINED = 1.2
_MOST = 330.0  # octaves: no rate of a recipe is farther from 1
_TOGETHER = 50  # with k times this many trials, fits are made after every k-th trial
_APART = 16  # factor between the lowest and the highest rank above which the drift is well measured
_OTHER_STUDY = "Give this calibration another name, or another storage."


@dataclass
class Study:
    """One calibration. `reference`, `prior` and the range are set when the first model is built.

    train: the loop's code. target_steps: by default `steps`. full_follows: as in `BracketSampler`.
    Other fields are arguments of `calibrate`.
    """

    optimizer: type[Optimizer]
    law: Law
    ranks: tuple[int | None, ...]
    steps: int
    seeds: tuple[int, ...] = (0, 1)
    train: Code = field(default_factory=Code)
    lr_range: tuple[float, float] | None = None
    batch: float | None = None
    warmup: float | None = None
    seed: int = 0
    name: str = "calibration"
    reference: Reference | None = None
    full_fan_in: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    target_steps: int = 0
    full_follows: bool = False

    def __post_init__(self) -> None:
        self.target_steps = self.target_steps or self.steps
        self._fits: dict[int, Fit | None] = {}
        self._ended: dict[int, TrialRecord] = {}
        self._opened: optuna.storages.BaseStorage | None = None
        self._optimizer_name = f"{self.optimizer.__module__}.{self.optimizer.__qualname__}"
        self._maker = {**self.train.loop, "rankaware-optim": version("rankaware-optim")}

    def open(self, sampler: Any, pruner: Any, storage: Any) -> None:
        """Create the Optuna study, or continue the stored one of this name."""
        self._brackets = sampler is None
        self._given = storage
        with self.guard():
            kept = open_storage(storage)
            self._opened = kept if isinstance(storage, (str, os.PathLike)) else None
            if self.name in optuna.get_all_study_names(kept):
                stored = optuna.load_study(study_name=self.name, storage=kept)
                self._check_one_length(stored)
                self._check_whole(stored)
            with quiet():
                self.optuna = optuna.create_study(
                    study_name=self.name,
                    storage=kept,
                    sampler=sampler or optuna.samplers.RandomSampler(seed=self.seed),
                    pruner=pruner or PairedPruner(self.steps, self.warmup or 0.0),
                    load_if_exists=True,
                )
            self._check_stored()
            self.recall()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Guard reads and writes of the storage. Its errors become `CalibrationError`, and Ctrl-C
        raises afterwards.
        """
        with Interrupts(once=True) as self._interrupts, storage_errors(self._given):
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

    def _check_one_length(self, stored: optuna.Study) -> None:
        """Raise a `CalibrationError` if an earlier version made the study with runs of several
        lengths or batches.
        """
        made_with = stored.user_attrs.get("made_with")
        if not isinstance(made_with, dict):
            return
        steps = made_with.get("steps")
        others = [
            t
            for t in stored.get_trials(deepcopy=False)
            if t.user_attrs.get("steps", steps) != steps
        ]
        if isinstance(steps, list) or made_with.get("batches") or others:
            raise CalibrationError(
                f"The stored study {self.name!r} was made by an earlier version with several"
                " lengths or batches.",
                _OTHER_STUDY,
            )

    def _check_whole(self, stored: optuna.Study) -> None:
        """Raise a `CalibrationError` if the study is damaged, before anything is written to it."""
        try:
            kept = stored.get_trials(deepcopy=False)
            known = stored.user_attrs  # after the trials, before which they are written
            made_with = known.get("made_with", {})
            steps = made_with.get("steps", math.inf)
            for record in Trials.read(kept):
                self._check_values(record)
                if record.rank not in (None, *made_with.get("ranks", [record.rank])):
                    raise TypeError(f"trial {record.number} has a rank that was not to be tried")
                if len(record.curve or ()) > steps:
                    raise TypeError(f"trial {record.number} has more values than steps")
            tables = made_with, made_with.get("multipliers", {}), known.get("settings", {})
            if len(stored.directions) > 1 or not all(isinstance(table, dict) for table in tables):
                raise TypeError("an attribute holds an impossible value")
            if "reference" in known:
                checked_multiplier(
                    self.law, (at := Reference(**known["reference"])).as_factor(), at
                )
                math.log2(known["full_fan_in"])
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise CalibrationError(
                f"The stored study {self.name!r} is damaged ({type(error).__name__}: {error}), and"
                " was not changed.",
                "Restore its storage from a copy, or give this calibration another name, or"
                " another storage.",
            ) from error

    @staticmethod
    def _check_values(record: TrialRecord) -> None:
        """Raise a `TypeError` unless each value of a trial has its type, and the range in which a
        recipe takes it.
        """
        bounded = {"rank": record.rank, "trial_lr": record.own_lr}
        typed = is_typed(record, TrialRecord) and (
            record.scaling is None or is_positive(record.scaling)
        )
        fits = all(value is None or is_within(name, value) for name, value in bounded.items())
        rates = record.x, record.observation and record.observation.x
        if not (typed and fits) or any(abs(x or 0) > _MOST for x in rates):
            raise TypeError(f"trial {record.number} holds an impossible value")

    def _check_stored(self) -> None:
        """Raise if the trials of a stored study cannot be compared with new ones. Warn if they may
        differ.
        """
        mine = {
            "schema": SCHEMA,
            "steps": self.steps,
            "ranks": [rank for rank in self.ranks if rank is not None],
            "seeds": sorted(self.seeds),
            "optimizer": self._optimizer_name,
            "batch": self.batch,
            "warmup": self.warmup,
        }
        multipliers = law_values(self.law, self.optimizer, self.ranks)
        # A worker that starts at the same time writes this before its first trial, so trials are
        # read before it.
        trials = self.trials()
        stored = self.optuna.user_attrs.get("made_with", {"schema": None})
        if trials:
            self._refuse(differences(stored, mine))
            law = differences(stored.get("multipliers", {}), multipliers, SAME_RATE)
            self._refuse(law, f"other rates of the law {stored.get('law')}: ")
        if trials.counted():
            self._compare_code(stored, "was made with")
        named = {"law": repr(self.law), "multipliers": multipliers}
        self.optuna.set_user_attr("made_with", {**mine, **named, **self._maker})

    def _compare_code(self, made_with: Mapping[str, Any], how: str) -> None:
        changed = differences(made_with, self._maker)
        if changed:
            warn(
                f"The stored study {self.name!r} {how} {changed}. Its trials can be compared with"
                " new ones only if the training has not changed. Otherwise give this calibration"
                " another name."
            )

    def _refuse(self, difference: str, what: str = "") -> None:
        if difference:
            raise CalibrationError(
                f"The stored study {self.name!r} was made with {what}{difference}.",
                _OTHER_STUDY,
            )

    def compare(self, trial: TrialRecord, built: Mapping[str, Any]) -> None:
        """Raise if a trial's model or settings differ from those of an earlier trial of its rank."""
        at = self.reference
        known = (
            {}
            if at is None or at.rank != trial.rank
            else {"width": at.fan_in, "alpha": at.alpha, "init": at.init}
        )
        earlier = (
            t.built
            for t in self.trials()
            if t.built and t.rank == trial.rank and t.number < trial.number
        )
        self._refuse(differences(next(earlier, known), built))

    def recall(self) -> None:
        """Read what the first trial of this or another worker settled. Warn if another worker runs
        different code.
        """
        stored = self.optuna.user_attrs
        self._compare_code(stored.get("made_with", {}), "is shared with a worker of")
        self.settings = stored.get("settings", self.settings)
        if self.reference is None and "reference" in stored:
            self._settle(Reference(**stored["reference"]), stored["full_fan_in"])

    def trials(self) -> Trials:
        """Return every trial so far, of all workers. Finished trials do not change, so they are
        read once.
        """
        found = self.optuna.get_trials(deepcopy=False)
        new = Trials.read(t for t in found if t.number not in self._ended)
        self._ended |= {t.number: t for t in new if t.state.is_finished()}
        going = (t for t in new if not t.state.is_finished())
        return Trials(sorted((*self._ended.values(), *going), key=lambda t: t.number))

    def learn(self, seen: Reference, survey: Survey) -> None:
        """Set the first model's configuration as the reference, and store it."""
        if self.reference is None:
            self._settle(replace(seen, batch=self.batch), survey.full_width(seen.init))
            self.optuna.set_user_attr("full_fan_in", self.full_fan_in)
            self.optuna.set_user_attr(
                "reference", asdict(self.settled())
            )  # written last: its readers need the width

    def _settle(self, reference: Reference, full_fan_in: float) -> None:
        """Set the reference, the priors for its init, and a first guess.

        The guess is the upper end of the family's usual rates, moved to the reference by the law.
        """
        self.reference, self.full_fan_in = reference, full_fan_in
        usual = _USUAL_LR.get(optimizer_family(self.optimizer), _USUAL_LR["sign-like"])
        moved = checked_multiplier(
            bound_law(self.law, self.optimizer, {}), reference.as_factor(), _USUAL_AT
        )
        low, high = self.lr_range or (-math.inf, math.inf)
        self._start = min(max(_ABOVE + math.log2(usual * moved), low), high)
        if self._brackets:
            self.optuna.sampler = BracketSampler(
                self._start, self.prior, self._fitted, self.full_follows
            )

    def settled(self) -> Reference:
        if self.reference is None:
            raise CalibrationError("No trial has built its model yet.", "Run at least one trial.")
        return self.reference

    def range(self) -> tuple[float, float]:
        """Return the range of log2 rates: as given or around the first guess, widened while a best
        rate is at an edge.

        Best rates are those of each rank, below the rates that diverged there. Where all runs rose,
        the lowest rate counts as the best. The range is computed from the trials each time, so that
        a resumed study has the same one.
        """
        low, high = self.lr_range or (self._start - _HALF_RANGE, self._start + _HALF_RANGE)
        seen = self.trials().observations()
        ran: dict[int | None, list[tuple[Observation, bool]]] = {}
        lowest, highest = math.inf, -math.inf
        for o, bad in zip(seen, diverged(seen), strict=True):
            lowest, highest = min(lowest, o.x), max(highest, o.x)
            own = ran.setdefault(o.rank, [])
            own.append((o, bad))
            cliff = min((one.x for one, lost in own if lost), default=math.inf)
            mine = [one for one, _ in own if one.x < cliff]
            at = min(mine, key=lambda one: one.value).x if mine else lowest
            low -= _WIDEN if (lowest if all_rose(mine) else at) < low + _EDGE else 0.0
            high += _WIDEN if mine and at > high - _EDGE and at >= highest else 0.0
        return low, high

    @property
    def prior(self) -> Prior:
        """Return the prior of the drift and of full finetuning, at the steps of the trials."""
        return self._carry.prior_of_trials(self._target_prior)

    @property
    def _target_prior(self) -> Prior:
        """The prior at the target's steps."""
        return prior_of(self.settled(), self.ranks, self.full_fan_in)

    @property
    def is_short(self) -> bool:
        """Whether the target run has more steps than the trials."""
        return self.target_steps != self.steps

    @property
    def _carry(self) -> Carry:
        """The move of best rates to the target's steps."""
        return carry_of(self.settled(), math.log2(self.target_steps / self.steps))

    @property
    def _bound_law(self) -> Law:
        return bound_law(self.law, self.optimizer, self.settings)

    def centred_law(self) -> Power:
        """Return the law, bound to the optimizer, at its prior means."""
        return centred_law(self._bound_law, self.settled(), self.prior.pivot)

    # --- the result -------------------------------------------------------------------------------

    def fit(self) -> Fit | None:
        """Return the fit of the trials so far, at their steps, or None if every run diverged."""
        return None if self.reference is None else self._fitted(self.trials())

    def _fitted(self, trials: Trials) -> Fit | None:
        """Return the fit, computed once for each number of observations, since a study only adds to
        them.

        With hundreds of trials, up to a fiftieth of them wait for a common fit.
        """
        done = trials.counted()
        seen = Trials(done[: len(done) - len(done) % max(1, len(done) // _TOGETHER)]).evidence()
        if len(seen) not in self._fits:
            self._fits = {len(seen): fit_observations(seen, self.prior)}
        return self._fits[len(seen)]

    def _at_target(self, fit: Fit) -> Fit:
        """Return a fit of the trials, moved to the target's steps."""
        return self._carry.to_target(fit, self._target_prior)

    def band(self) -> float | None:
        """Return the width of the target's 90 % band at the worst rank, octaves. None before any
        fit.
        """
        fit = self.fit()
        if fit is None:
            return None
        fit = self._at_target(fit)
        return max(2 * Z90 * fit.sd(rank) for rank in self.ranks)

    def standing(self) -> tuple[float, float, float] | None:
        """Return (low, best, high) base rates of the target so far, the 90 % band; None before any
        fit.
        """
        fit = self.fit()
        if fit is None:
            return None
        fit = self._at_target(fit)
        half = Z90 * fit.sd(self.ranks[0])
        low, best, high = (2.0 ** (float(fit.mean[0]) + octaves) for octaves in (-half, 0.0, half))
        return low, best, high

    def recipe(self) -> Recipe:
        """Return the recipe of the trials so far."""
        self.recall()  # needed if other workers ran every trial
        trials = self.trials().counted()
        fit, reference = self._at_target(self._fit_or_raise(trials)), self.settled()
        tried = {o.rank for o in trials.observations()}
        slope = self._carry.lora
        scalings = {
            t.rank: t.scaling for t in trials if t.rank is not None and t.scaling is not None
        }
        return recipe_of(
            fit,
            self._bound_law,
            reference,
            name=self.name,
            scaling_rule=infer_scaling(scalings),
            full_fan_in=self.full_fan_in,
            ranks=tuple(rank for rank in self.ranks if rank in tried and rank is not None),
            full_seen=None in tried,
            optimizer=self._optimizer_name,
            settings=self._settings(trials),
            steps=self.target_steps,
            batch=self.batch,
            warmup=self.warmup,
            horizon=Horizon(slope.mean, slope.sd),
            seed=self.seed,
            versions=versions_used(self.train.imports),
            source=self.train.source,
            other_rates=agreed(
                [trial.built.get("other rates", {}) for trial in trials if trial.built]
            ),
            notes=self._notes(fit, trials),
            tensors=trials.tensors(self.steps),
        )

    def _settings(self, trials: Trials) -> dict[str, Any]:
        """Return the optimizer's settings common to all trials, defaults included; those given if
        none are known.
        """
        names = {**defaults_of(self.optimizer), **self.settings}
        built = [settings_in(trial.built, names) for trial in trials if trial.built]
        return agreed(built) if built else dict(self.settings)

    def _fit_or_raise(self, trials: Trials) -> Fit:
        if trials and all(trial.stopped == "memory" for trial in trials):
            raise CalibrationError(
                f"Every one of {len(trials)} runs ran out of memory.",
                f"Lower the batch or the ranks, or free memory.{self._stored_too}",
            )
        fit = fit_observations(trials.evidence(), self.prior)
        if fit is None:
            some_pruned = len(trials.observations()) < len(trials)
            raise CalibrationError(
                f"Every one of {len(trials)} runs diverged{' or was pruned' * some_pruned}.",
                f"Lower the rates, or check the loss, the data and the pruner.{self._stored_too}",
            )
        for runs in trials.hopeless():
            raise CalibrationError(
                f"Every one of {runs} diverged, though other ranks train.",
                f"Check the model at that rank, or leave the rank out.{self._stored_too}",
            )
        return fit

    @property
    def _stored_too(self) -> str:
        """The cure of a study whose runs all failed, if they are stored, since they are not made
        again.
        """
        return (
            ""
            if self._given is None
            else " The runs are stored, so give another name or storage too."
        )

    def _notes(self, fit: Fit, trials: Trials) -> tuple[str, ...]:
        """Return sentences on what the data do not determine and on problems of the runs."""
        lora, cell, notes = [r for r in self.ranks if r is not None], trials.unsteady(), []
        if len(lora) > 1 and max(lora) < _APART * min(lora):
            notes.append(
                f"ranks {min(lora)} and {max(lora)} differ by less than a factor 16: the drift is"
                " uncertain"
            )
        if math.sqrt(float(fit.covariance[0, 0])) > _UNDETERMINED or is_flat(trials.counted()):
            notes.append("the data do not determine the rate: the loss hardly depends on it")
        if self.is_short:
            octaves, variance = self._carry.of(self._carry.lora)
            notes.append(
                f"{self.target_steps} steps were not tried: the rate is that of {self.steps}, moved"
                f" by {octaves:+.2f} ± {math.sqrt(variance):.2f} octaves"
            )
        if cell is not None:
            where = "full finetuning" if cell.rank is None else f"rank {cell.rank}"
            notes.append(
                f"train is not reproducible: two runs of {where}, seed {cell.seed}, began with"
                " different values, which adds noise; draw everything from trial.seed, and yield"
                " the loss before the step"
            )
        return tuple(notes)
