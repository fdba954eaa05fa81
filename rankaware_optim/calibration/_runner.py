"""Running a calibration: begin, train and record the next trial, on one worker of several and one
process of many.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import Any, TypeVar

import msgspec
import optuna
import torch
import torch.distributed as dist
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from torch import nn

from .._types import Reference, Survey, width_for
from .._warn import warn
from ..errors import CalibrationError, CalibrationInterrupted
from ..fitting import TAIL, Observation, height, noise_of, recent
from ..inspection import as_one_model, inspect_model
from ..laws import Power, checked_multiplier
from ..optimizer import RankAwareOptimizer
from ..recipe import Recipe, layers_of, plain_value
from ._calibration import DOUBTS, Calibration, Settled, calibrated_recipe
from ._constants import POLL_S, SLOW_POLL_S
from ._liveness import Heartbeat, held_back
from ._provenance import (
    built_with,
    check_comparable,
    made_with,
    shape_of,
    warn_of_code,
)
from ._schedule import Options, next_setting
from ._search import BracketSampler, PairedPruner, divergence_limits, search_range
from ._storage import (
    begin_trial,
    close_storage,
    open_storage,
    place_of,
    quiet,
    storage_errors,
)
from ._trial import Train, Trial, run_trial, seeded
from ._trials import PARAMETER, Setting, TrialRecord, Trials, interval, rank_words

T = TypeVar("T")
_HERE = __name__.partition(".")[0]
# the storages and names of the calibrations whose trials run in this thread
_INSIDE: ContextVar[tuple[tuple[Any, str], ...]] = ContextVar("inside", default=())
# takes the trials done, with the share of the running one, what runs, and the best base rate
Show = Callable[[float, str, "float | None"], None]


class Replicas:
    """The processes of this training, or only this one if torch.distributed was not started.

    Messages use a separate gloo group. They need no device and cannot mix with those of the
    training.
    """

    def __init__(self) -> None:
        started = (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        self._group = dist.new_group(backend="gloo") if started else None

    @property
    def leads(self) -> bool:
        """Whether this process decides. Only this one uses the study's storage and the terminal."""
        return self._group is None or dist.get_rank() == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """Call `decide` on the leading process. Return its result, or raise its error, on every
        process.
        """
        if self._group is None:
            return decide()
        message: list[Any] = [None]
        if self.leads:
            try:
                message = [(decide(), None)]
            except BaseException as raised:
                message = [(None, raised)]
        dist.broadcast_object_list(message, src=0, group=self._group)
        value, error = message[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def mean(self, value: float) -> float:
        """Return the mean of a value over all processes, each of which has a part of the batch."""
        if self._group is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return float(total) / dist.get_world_size()

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)


class Runner:
    """Runs the trials of a calibration by its schedule.

    Several workers may do so at once. All that they share is the storage. Two that read it at the
    same moment may take the same setting: they run it at two rates, and a run more does no harm.
    Under DDP or FSDP only the leading process of `team` has an Optuna study. The others get its
    decisions.

    Args:
        options: what is tried.
        source: see `source_of`.
    """

    def __init__(self, options: Options, source: Mapping[str, str]) -> None:
        self.options, self.noisy = options, options.noisy
        self.calibration = Calibration(options, self._read)
        self.team = Replicas()
        self.mean = self.team.mean
        self.before = 0  # trials that had ended before this worker came
        self.show: Show = lambda done, what, best: None
        self._source = source
        self._made = made_with(options, source)
        self.storage: Any = None
        self._opened: optuna.storages.BaseStorage | None = None
        self._place: tuple[Any, str] = None, options.name  # of the study
        # from `open` on, in the leading process
        self._study: Any = None
        self._heartbeat: Any = None
        self._trial: Any = None  # Optuna's, that this worker runs
        self._is_known_pruner = True  # ours or Optuna's, which reads the storage
        self._ended: dict[int, TrialRecord] = {}

    # --- the study --------------------------------------------------------------------------------

    def open(self, sampler: Any, pruner: Any, storage: Any) -> None:
        """Create the Optuna study, or continue the stored one of the same name.

        It waits until each trial that runs has shown a sign of life, or has ended. So the same call
        after a kill repeats the killed trial before it goes on, as if it had not been killed.
        """
        self.storage = storage
        silent = self._agree(lambda: self._open(sampler, pruner))

        def is_heard() -> bool:
            running = self._read().running()
            return all(silent.get(t.number, -1) != t.heartbeat for t in running)

        self._wait(is_heard)

    def _open(self, sampler: Any, pruner: Any) -> dict[int, int | None]:
        """Open the study. Return the last heartbeats of the trials that run."""
        opened = open_storage(self.storage)
        if isinstance(self.storage, (str, os.PathLike)):
            self._opened = opened
        self._place = place_of(self.storage), self.options.name
        if self._place in _INSIDE.get():
            raise CalibrationError(
                f"The calibration {self.options.name!r} was started inside one of its own trials,"
                " and would wait for that trial to end.",
                "Give it another name or storage.",
                "name",
            )
        pruner = pruner or PairedPruner(self.calibration)
        known = (_HERE, optuna.__name__)
        self._is_known_pruner = type(pruner).__module__.partition(".")[0] in known
        with quiet():
            self._study = optuna.create_study(
                study_name=self.options.name,
                storage=opened,
                sampler=sampler or BracketSampler(self.calibration),
                pruner=pruner,
                load_if_exists=True,
            )
        trials = self._read()
        self._check_study(trials)
        for trial in (*trials.counted(), *trials.running())[-1:]:
            warn_of_code(self.options.name, trial.made_with, self._made)
        self._recall()
        self.before = len(trials.counted())
        self._heartbeat = Heartbeat(self._study)
        self._heartbeat.start()
        return {trial.number: trial.heartbeat for trial in trials.running()}

    def _check_study(self, trials: Trials) -> None:
        """Raise unless the study is of these options: those of its first trial. Of two workers that
        start together only the storage knows which was first.
        """
        for first in trials[:1]:
            check_comparable(self.options.name, first.made_with, self._made)

    def _recall(self) -> None:
        """Read what the first trial of this or another worker settled."""
        stored = self._study.user_attrs
        self.calibration.settings = stored.get("settings", {})
        if self.calibration.settled is None and "settled" in stored:
            self.calibration.settle(msgspec.convert(stored["settled"], Settled))

    def _read(self) -> Trials:
        """Return every trial so far, of all workers. Finished trials do not change, so they are
        read once.
        """
        if self._study is None:
            return Trials()
        trials = []
        for stored in self._study.get_trials(deepcopy=False):
            trial = self._ended.get(stored.number) or TrialRecord.read(stored)
            if trial.state.is_finished():
                self._ended[trial.number] = trial
            trials.append(trial)
        return Trials(trials)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Guard reads and writes of the storage. Its errors become `CalibrationError`, and Ctrl-C
        raises afterwards.
        """
        with held_back(), storage_errors(self.storage):
            yield

    def _agree(self, decide: Callable[[], T]) -> T:
        """Return on every process what the leading process decides from the storage."""
        return self.team.agree(self._guard()(decide))

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait for other workers until the leading process is `ready`."""
        pause = POLL_S
        while not self._agree(ready):
            time.sleep(pause)
            pause = min(2 * pause, SLOW_POLL_S)

    def close(self) -> None:
        """Fail the unfinished trial, and leave the storage and the other processes.

        A signal waits until the trial is failed, and the next one raises at once. If the storage
        itself failed, other workers and the next call notice that the heartbeats have stopped.
        """
        try:
            with suppress(CalibrationError), self._guard():
                if self._heartbeat:
                    self._heartbeat.stop()
                self._close(TrialState.FAIL)
        finally:
            if self._opened is not None:
                with self._guard():
                    close_storage(self._opened)
            self.team.close()

    # --- the result -------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        """Return the recipe of the trials so far."""
        recipe = self._agree(self._recipe)
        if self.team.leads:
            for doubt in filter(recipe.notes.__contains__, DOUBTS):
                warn(f"Recipe {recipe.name!r}: {doubt}.")
        return recipe

    def _recipe(self) -> Recipe:
        self._recall()  # needed if other workers ran every trial
        return calibrated_recipe(self.calibration, self._source)

    def interrupted(self) -> CalibrationInterrupted:
        """Return the error of Ctrl-C, with the progress and the recipe so far."""
        with self._guard():
            ended = len(self._read().counted())
            error = CalibrationInterrupted(
                f"The calibration was interrupted after {ended} of {self.options.expected} trials.",
                "Their fit is this error's .recipe. With a storage the same call continues where it"
                " stopped.",
            )
            if self.calibration.fit() is not None:
                error.recipe = self._recipe()
            return error

    # --- one trial --------------------------------------------------------------------------------

    def next(self) -> Setting | None:
        """Return what to try next, or None once the schedule is complete. It waits for the last
        trials of other workers, which may die and be run again here.
        """

        def due() -> Setting | None:
            return next_setting(self.options, self._read())

        self._wait(lambda: due() is not None or not self._read().running())
        return self._agree(due)

    def run(self, setting: Setting, train: Train) -> None:
        """Run and record a trial. If it raises, `close` fails it."""
        steps = self.options.steps
        number = self._agree(lambda: self._begin(setting))
        try:
            self._wait(self._may_choose)
            limits = self._agree(lambda: self._prepare(setting))
            trial = Trial(*setting, number, steps, limits, self)
            with seeded(trial.seed), self._inside():
                run_trial(train, trial)
            is_read = trial._stopped or "steps" in vars(trial)
            if self.options.target > steps and not is_read:
                raise CalibrationError(
                    "train never read trial.steps, so its schedule may span the steps of the target"
                    " run.",
                    "Let its schedule and warm-up span trial.steps.",
                )
            self._agree(lambda: self._end(trial))
            self._show(trial, 1.0)
        except UpdateFinishedTrialError:
            self._agree(lambda: self._close(TrialState.FAIL))
            warn(
                f"Trial {number} had no heartbeat for so long that another worker has failed it."
                " Its run here does not count."
            )

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Mark that a trial of this calibration runs."""
        token = _INSIDE.set((*_INSIDE.get(), self._place))
        try:
            yield
        finally:
            _INSIDE.reset(token)

    def _begin(self, setting: Setting) -> int:
        """Create a running trial that has its setting from the start, and return its number."""
        attributes = {**setting._asdict(), "heartbeat": 0, "made_with": self._made}
        self._trial = begin_trial(self._study, attributes)
        self._heartbeat.trial = self._trial
        self._check_study(self._read())
        return int(self._trial.number)

    def _may_choose(self) -> bool:
        """Return whether trials begun before this one have their rates, so that no point is tried
        twice. The first trial of a study has none before its model is built.
        """
        running = self._read().running()
        earlier = [t for t in running if t.number < self._trial.number]
        # after the trials, since what a trial settles is stored before its rate
        self._recall()
        return all(t.x is not None for t in earlier)

    def _prepare(self, setting: Setting) -> list[float]:
        """Choose the trial's rate, if a model was built before. Return the limits above which it
        counts as diverged.
        """
        if self.calibration.settled is not None:
            self._take_rate()
        ended = self._read().counted()
        self._progress = len(ended), self.calibration.best()
        return divergence_limits(ended, setting, self.options.steps)

    def _take_rate(self) -> float:
        """Return log2 of the trial's rate, sampled once."""
        x = self._trial.params.get(PARAMETER)
        if x is None:
            within = search_range(self.calibration)
            x = self._trial.suggest_float(PARAMETER, *within)
        return float(x)

    def is_pruned(self, trial: Trial) -> bool:
        """Show and store the values of a run so far. Return whether it is to be pruned."""
        taken, steps = len(trial._curve), trial._steps
        self._show(trial, taken / steps)
        every = interval(steps)
        if taken % every and taken != steps:
            return False
        value = recent(trial._curve, max(TAIL, every))
        self._agree(lambda: self._trial.report(value, taken))
        # the errors of a user's own pruner are no storage's
        agree = self._agree if self._is_known_pruner else self.team.agree
        return taken < steps and agree(lambda: self._trial.should_prune())

    def _show(self, trial: Trial, share: float) -> None:
        """Show that a share of the trial was run."""
        if self.team.leads:
            done, best = self._progress
            self.show(done + share, rank_words(trial.rank), best)

    def _end(self, trial: Trial) -> None:
        """Record the outcome of a run."""
        store = self._trial.set_user_attr
        curve = trial._curve
        store("curve", curve)
        store("warmup", trial._warmup)
        if trial._stopped in ("pruned", "memory"):
            store("stopped", trial._stopped)
            return self._close(TrialState.PRUNED)
        score = recent(curve) if trial._returned is None else trial._returned
        observation = Observation(
            trial.rank,
            trial.seed,
            x=self._take_rate(),
            value=math.inf if trial._stopped else score,
            start=height(curve),
            tail=recent(curve),
            returned=trial._returned is not None,
            stopped=bool(trial._stopped),
            first=curve[0],
            noise=noise_of(curve),
        )
        self._check_scored(observation)
        store("observation", asdict(observation))
        if math.isfinite(observation.value):
            return self._close(TrialState.COMPLETE, observation.value)
        self._close(TrialState.PRUNED)

    def _check_scored(self, run: Observation) -> None:
        """Raise unless all scores were returned, or none, since they cannot be compared."""
        for other in self._read().observations():
            mixed = other.returned != run.returned
            if mixed and not (run.stopped or other.stopped):
                raise CalibrationError(
                    "train returned a score in some trials and none in others.",
                    "Return one in every trial, or in none.",
                )

    def _close(self, state: TrialState, value: float | None = None) -> None:
        """End the trial, unless another worker has failed it."""
        if self._trial is not None:
            self._heartbeat.trial = None
            self._study.tell(self._trial, value, state=state, skip_if_finished=True)
            self._trial = None

    # --- the trial's optimizer --------------------------------------------------------------------

    def build(
        self, trial: Trial, params: Any, settings: dict[str, Any]
    ) -> RankAwareOptimizer:
        """Build the optimizer for `Trial.optimizer`: read the model, then choose a rate in
        reference coordinates.
        """
        several = as_one_model(params)
        model = as_one_model(settings.get("model", several))
        if not isinstance(model, nn.Module):
            raise CalibrationError(
                "trial.optimizer got no model.",
                "Pass it, or model= with its parameters.",
            )
        survey = inspect_model(model, method=trial.method, init=settings.get("init"))
        at = survey.dominant().resolve(survey)
        trial.lr, law, reference = self._agree(
            lambda: self._propose(trial.rank, survey, at, settings)
        )
        native = self.options.optimizer
        at_own_lr: set[int] = set()
        if not isinstance(several, nn.Module):
            params = [*params]
            groups = enumerate(params)
            at_own_lr = {i for i, g in groups if isinstance(g, Mapping) and "lr" in g}
        optimizer = RankAwareOptimizer(
            params,
            native,
            lr=trial.lr,
            law=law,
            tuned_at=reference,
            method=trial.method,
            **settings,
        )
        built = built_with(optimizer, native, settings, at, at_own_lr)
        self._wait(lambda: self._may_compare(trial.rank))
        self._agree(lambda: self._record(trial.rank, built))
        return optimizer

    def _propose(
        self, rank: int | None, survey: Survey, at: Reference, settings: dict[str, Any]
    ) -> tuple[float, Power, Reference]:
        """Return the trial's base rate, the law centred on its priors, and the reference that both
        belong to. `at` is the model's configuration.
        """
        if at.rank != rank:
            raise CalibrationError(
                f"The model built for trial.rank={rank} has rank {at.rank}.",
                "Build it at trial.rank.",
            )
        calibration = self.calibration
        if calibration.settled is None:
            self._settle(survey, at)
        ours = inspect.signature(RankAwareOptimizer.__new__).parameters
        calibration.settings = {
            name: plain_value(value)
            for name, value in settings.items()
            if name not in ours
        }
        lr = 2.0 ** self._take_rate()
        law = calibration.centred_law()
        reference = calibration.known().reference
        width = width_for(survey, at.method, reference.init)
        factor = replace(at, fan_in=width).as_factor()
        own_lr = lr * checked_multiplier(law, factor, reference)
        self._trial.set_user_attr("own_lr", own_lr)
        return lr, law, reference

    def _settle(self, survey: Survey, at: Reference) -> None:
        """Let the first model's configuration be the reference, and store it."""
        reference = replace(at, batch=self.options.batch)
        settled = Settled(
            reference, survey.full_width(reference.init), layers_of(survey)
        )
        self.calibration.settle(settled)
        self._study.set_user_attr("settled", asdict(settled))

    def _may_compare(self, rank: int | None) -> bool:
        """Return whether a trial of the rank begun before this one has stored what it was built
        with, or none will.
        """
        trials = self._read()
        earlier = Trials(t for t in trials.at(rank) if t.number < self._trial.number)
        return any(t.built for t in earlier) or not earlier.running()

    def _record(self, rank: int | None, built: dict[str, Any]) -> None:
        """Store what the trial was built with. Raise if an earlier one of its rank, or the
        reference, had another model or other settings.
        """
        reference = self.calibration.known().reference
        before = shape_of(reference) if reference.rank == rank else {}
        for trial in self._read().at(rank):
            if trial.built and trial.number < self._trial.number:
                before = trial.built
                break
        check_comparable(self.options.name, before, built)
        self._trial.set_user_attr("built", built)
        self._study.set_user_attr("settings", self.calibration.settings)
