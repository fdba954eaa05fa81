"""The study of a calibration: it hands out what to try next, and stores how the runs ended.

Several workers may share a study through its storage. Each worker may consist of several processes,
of which one leads.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from tokenize import TokenError
from typing import Any, TypeVar

import optuna
import torch
import torch.distributed as dist
from optuna.trial import TrialState

from .._warn import warn
from ..errors import CalibrationError, CalibrationInterrupted
from ..recipe import Recipe, differences, plain_value
from ._calibration import DOUBTS, Calibration, calibrated_recipe, refuse_ends
from ._constants import POLL_S, SLOW_POLL_S
from ._progress import Progress
from ._schedule import Options, next_setting
from ._storage import (
    Heartbeat,
    StorageLike,
    begin_trial,
    close_storage,
    held_back,
    open_storage,
    quiet,
    storage_errors,
)
from ._trials import Run, Setting, Trials

T = TypeVar("T")
# Of a stored study. Raise it when another version of this package would misread what is stored.
_SCHEMA = 4


class Replicas:
    """The processes of one training, or only this one if torch.distributed was not started.

    One process leads: it alone uses the storage, draws what to try, and prints. The others wait for
    its decisions. So every process must call `agree` and `mean` in the same order: whatever a
    process does only by itself, such as catching an error of its own, must not change that order.
    The messages use a gloo group of their own. They need no device, and cannot be mistaken for
    those of the training.
    """

    def __init__(self) -> None:
        started = (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        self._group = dist.new_group(backend="gloo") if started else None

    @property
    def leads(self) -> bool:
        """Whether this process decides. Only it uses the study's storage and prints."""
        return self._group is None or dist.get_rank() == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """Call `decide` on the leading process, and return its result on every process. If it
        raises an error, every process raises it.
        """
        if self._group is None:
            return decide()
        # The result and the error go to the others in one message. If only the result did, they
        # would wait for ever after an error.
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
        # NaN of one process makes the mean NaN everywhere, so that all end the run together
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return float(total) / dist.get_world_size()

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)


class Study:
    """The runs of a calibration, of all its workers. The workers share nothing but the storage.

    Under DDP or FSDP only the leading process of `replicas` has Optuna's study. The others get its
    decisions.

    Args:
        options: what the calibration tries.
        source: the code that is trained, see `source_of`.
        progress: what shows how far the calibration is.
    """

    def __init__(
        self, options: Options, source: Mapping[str, str], progress: Progress
    ) -> None:
        self.options = options
        self.replicas = Replicas()
        self._source, self._progress = source, progress
        if not self.replicas.leads:
            progress.mute()
        self._made_with = made_with(options)
        # a stored study of other code is continued with a warning
        self._code = {**source, "rankaware-optim": version("rankaware-optim")}
        self._place: StorageLike = None
        self._to_close: optuna.storages.BaseStorage | None = None
        # from `open` on, in the leading process
        self._study: optuna.Study | None = None
        self._heartbeat: Heartbeat | None = None
        self._calibration: Calibration | None = None
        self._ended: dict[int, Run] = {}

    # --- the storage ------------------------------------------------------------------------------

    def lead(self, work: Callable[..., T], *arguments: object) -> T:
        """Do work that uses the storage in the leading process, and return its result in all.

        Errors of the storage become a `CalibrationError`. Ctrl-C waits until the work is done.
        """

        def guarded() -> T:
            with self._guard():
                return work(*arguments)

        return self.replicas.agree(guarded)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        with held_back(), storage_errors(self._place):
            yield

    def wait(self, is_ready: Callable[..., bool], *arguments: object) -> None:
        """Wait for other workers until `is_ready` returns True in the leading process."""
        pause = POLL_S
        while not self.lead(is_ready, *arguments):
            time.sleep(pause)
            pause = min(2 * pause, SLOW_POLL_S)

    def open(self, storage: StorageLike, price: str) -> None:
        """Create the Optuna study, or continue the stored one of the same name.

        Args:
            storage: see `calibrate`.
            price: what the trials cost beside their steps, which a new study shows.
        """
        self._place = storage
        self.lead(self._open)
        self.lead(self._announce, price)
        silent = self.lead(self._begin_heartbeat)
        # A killed worker leaves a running trial, and so does a worker that is still alive. Wait
        # until each of them has shown a new heartbeat or was declared dead: then the same call
        # after a kill repeats the killed trial first, and goes on as if nothing had happened.
        self.wait(self._are_heard, silent)

    def _open(self) -> None:
        opened = open_storage(self._place)
        if isinstance(self._place, (str, os.PathLike)):
            self._to_close = opened
        with quiet():
            self._study = optuna.create_study(
                study_name=self.options.name,
                storage=opened,
                load_if_exists=True,
            )
        self.check_options(self.runs())

    def _announce(self, price: str) -> None:
        """Show what a new study costs, or warn if a stored one was made with other code."""
        trials = self.runs()
        ended = trials.counted()
        for last in (*ended, *trials.running())[-1:]:
            if changed := differences(last.made_with, self._code):
                warn(
                    f"The stored study {self.options.name!r} was made with {changed}. Its trials"
                    " can be compared with new ones only if the training is the same. If it is"
                    " not, choose another storage= for this calibration."
                )
        self._progress.begin(self.options, trials, price)

    def _begin_heartbeat(self) -> dict[int, int | None]:
        """Start this worker's heartbeat. Return the last heartbeat of every running trial."""
        running = self.runs().running()
        assert self._study is not None
        self._heartbeat = Heartbeat(self._study)
        self._heartbeat.start()
        return {run.number: run.heartbeat for run in running}

    def _are_heard(self, silent: Mapping[int, int | None]) -> bool:
        """Return whether each trial that runs has another heartbeat than in `silent`."""
        running = self.runs().running()
        return all(silent.get(run.number, -1) != run.heartbeat for run in running)

    def check_options(self, trials: Trials) -> None:
        """Raise a `CalibrationError` if the study's first trial was made with other options.

        If two workers start together, only the storage knows which of them was first.
        """
        for first in trials[:1]:
            self.check_comparable(first.made_with, self._made_with)

    def check_comparable(
        self, stored: Mapping[str, object], now: Mapping[str, object]
    ) -> None:
        """Raise a `CalibrationError` if stored runs were made with other values than new ones."""
        if difference := differences(stored, now):
            raise CalibrationError(
                f"The stored study {self.options.name!r} was made with {difference}.",
                "Choose another storage= for this calibration.",
            )

    def close(self) -> None:
        """Mark the unfinished trial as failed, and close the storage and the group of processes.

        Ctrl-C waits until the trial is marked, and a second Ctrl-C raises at once. If the storage
        itself failed, other workers and the next call notice that the heartbeats have stopped.
        """
        try:
            with suppress(CalibrationError), self._guard():
                if self._heartbeat:
                    self._heartbeat.stop()
                    self.end_trial(TrialState.FAIL)
        finally:
            if self._to_close is not None:
                with self._guard():
                    close_storage(self._to_close)
            self.replicas.close()

    # --- its runs ---------------------------------------------------------------------------------

    def runs(self) -> Trials:
        """Return every run so far, of all workers. A finished run no longer changes, so it is read
        only once.
        """
        if self._study is None:
            return Trials()
        runs = []
        for stored in self._study.get_trials(deepcopy=False):
            run = self._ended.get(stored.number) or Run.read(stored)
            if run.state.is_finished():
                self._ended[run.number] = run
            runs.append(run)
        return Trials(runs)

    def calibration(self) -> Calibration | None:
        """Return what the runs say, or None until a first trial has built its model."""
        if self._calibration is None:
            builds = [run.build for run in self.runs() if run.build]
            if builds:
                self._calibration = Calibration(self.options, builds[0], self.runs)
        return self._calibration

    def next(self) -> Setting | None:
        """Return what to try next, or None once the schedule is complete.

        It waits for the last trials of other workers, because one of them may die, and its trial
        is then run again here.
        """
        self.wait(self._may_go_on)
        return self.lead(self._due)

    def _may_go_on(self) -> bool:
        return self._due() is not None or not self.runs().running()

    def _due(self) -> Setting | None:
        return next_setting(self.options, self.runs())

    def begin_trial(self, setting: Setting) -> optuna.trial.Trial:
        """Create a running trial in Optuna's storage, which has its setting from the start."""
        made_with = {**self._made_with, **self._code}
        attributes = {**setting._asdict(), "heartbeat": 0, "made_with": made_with}
        assert self._study is not None
        assert self._heartbeat is not None
        trial = begin_trial(self._study, attributes)
        self._heartbeat.trial = trial
        return trial

    def end_trial(self, state: TrialState, value: float | None = None) -> None:
        """End this worker's trial, unless another worker has declared it dead."""
        if self._study is None or self._heartbeat is None:
            return
        trial = self._heartbeat.trial
        if trial is None:
            return
        self._study.tell(trial, value, state=state, skip_if_finished=True)
        self._heartbeat.trial = None
        if state != TrialState.FAIL:
            self._progress.trial_ended(trial.number, self.runs(), self.options)

    # --- the result -------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        """Return the recipe that follows from the runs so far."""
        recipe = self.lead(self._recipe)
        if self.replicas.leads:
            for doubt in filter(recipe.notes.__contains__, DOUBTS):
                warn(f"Recipe {recipe.name!r}: {doubt}.")
        return recipe

    def _recipe(self) -> Recipe:
        self.check_options(self.runs())  # another worker may have run all of them
        calibration = self.calibration()
        if calibration is None:
            refuse_ends(self.runs().counted())
        return calibrated_recipe(calibration, {"train": self._source["train"]})

    def interrupted(self) -> CalibrationInterrupted:
        """Return the error that Ctrl-C becomes, with the recipe of the finished trials."""
        with self._guard():
            ended = self.runs().counted()
            fit = "The recipe of these trials is this error's attribute recipe."
            if not ended:
                fit = "There is no recipe yet."
            error = CalibrationInterrupted(
                f"The calibration was interrupted after {len(ended)} of"
                f" {self.options.runs} trials.",
                f"{fit} If storage= was passed, the same call continues where it stopped.",
            )
            with suppress(CalibrationError):
                error.recipe = self._recipe()
            return error


# --- what runs are made with ----------------------------------------------------------------------


def source_of(train: Callable[..., object]) -> dict[str, str]:
    """Return the name of a training loop, and the first twelve digits of its source's hash if the
    source can be read. Partials and decorators around the function are ignored.

    A recipe keeps the name. The hash is for a stored study, which warns if the code has changed.
    """
    function = inspect.unwrap(train)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    if not hasattr(function, "__qualname__"):
        function = type(function)
    source = {"train": function.__qualname__}
    # the last two: the file was edited meanwhile, and other text stands at the function's line
    with suppress(OSError, TypeError, SyntaxError, TokenError):
        text = inspect.getsource(function)
        source["hash"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return source


def made_with(options: Options) -> dict[str, Any]:
    """Return the options that all trials of a study must share, so that they can be compared."""
    return {
        "schema": _SCHEMA,
        "steps": options.steps,
        "ranks": options.lora,
        "seeds": sorted(options.seeds),
        "optimizer": options.optimizer_name,
        "batch": options.batch,
        "law": plain_value(options.law),
    }
