"""This module manages the Optuna study of a calibration. The study of a calibration
decides which trial comes next, and stores the results of all trials.

Several worker processes can share a study through its storage. A worker can consist of
several processes that train a model together, and one of these processes is the leading
process.
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
# The version of the format of stored studies. Increase it when an older version of this
# package would misread a new study, or the other way round.
_SCHEMA = 4


class Replicas:
    """Coordinates the processes that train a model together.

    If torch.distributed was not started, the current process works alone. If
    torch.distributed was started, only the leading process uses the storage, chooses
    the trials and prints. All other processes wait for the decisions of the leading
    process. Every process must therefore call `agree` and `mean` in the same order,
    even if it catches an error that no other process sees. The processes of a worker
    communicate through a separate process group that uses gloo. Gloo works without a
    GPU, and a separate process group keeps these messages apart from the communication
    of the training.
    """

    def __init__(self) -> None:
        started = (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        self._group = dist.new_group(backend="gloo") if started else None

    @property
    def leads(self) -> bool:
        """Return whether this process is the leading process, which is the only one that prints."""
        return self._group is None or dist.get_rank() == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """Call a function on the leading process, and return the function's result on
        every process.

        If the function raises an error on the leading process, every process raises
        this error.
        """
        if self._group is None:
            return decide()
        # The result and the error are sent in the same message. If only results were sent,
        # the other processes would wait forever after an error.
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
        """Return the mean of a number over all processes that train the model
        together.
        """
        if self._group is None:
            return value
        # Each process sees only its part of the batch. If the value is NaN on one process,
        # the mean is NaN on every process, so all processes end the run together.
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return float(total) / dist.get_world_size()

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)


class Study:
    """Manages all trials of a calibration, including the trials of other workers.

    Workers of a calibration communicate only through the storage of the study. Under
    DDP or FSDP, only the leading process opens the Optuna study, and it sends its
    decisions to the other processes.

    Args:
        options: the options of the calibration.
        source: identifies the training code, see `source_of`.
        progress: prints the progress of the calibration.
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
        # If the code has changed, a stored study is continued with a warning, because many
        # edits (a renamed variable, a new print) do not change the training.
        self._code = {**source, "rankaware-optim": version("rankaware-optim")}
        self._place: StorageLike = None
        self._to_close: optuna.storages.BaseStorage | None = None
        # The leading process sets these in `open`. They stay None in every other process.
        self._study: optuna.Study | None = None
        self._heartbeat: Heartbeat | None = None
        self._calibration: Calibration | None = None
        self._ended: dict[int, Run] = {}

    # --- the storage ------------------------------------------------------------------------------

    def lead(self, work: Callable[..., T], *arguments: object) -> T:
        """On the leading process, call a function that uses the storage, and return its
        result on every process.

        An error of the storage is raised as a `CalibrationError`. Ctrl-C takes effect only
        after the function has returned.
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
        """Wait on all processes until the function `is_ready` returns True on the
        leading process.
        """
        pause = POLL_S
        while not self.lead(is_ready, *arguments):
            time.sleep(pause)
            pause = min(2 * pause, SLOW_POLL_S)

    def open(self, storage: StorageLike, price: str) -> None:
        """Create the Optuna study, or continue the stored study that has the same name.

        Args:
            storage: see `calibrate`.
            price: a description of what the trials cost in addition to their steps. A new
                study prints it.
        """
        self._place = storage
        self.lead(self._open)
        self.lead(self._announce, price)
        silent = self.lead(self._begin_heartbeat)
        # A trial that is marked as running may belong to a live worker or to a killed one.
        # Wait until each of these trials has a new heartbeat or its worker was declared dead.
        # If the user repeats a call after a kill, the killed trial is then repeated first,
        # and the search continues as if it had never been interrupted.
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
        """Print how many steps a new calibration needs, or warn if a stored study used
        different code.
        """
        trials = self.runs()
        ended = trials.counted()
        for last in (*ended, *trials.running())[-1:]:
            if other_code := differences(last.made_with, self._code):
                warn(
                    f"The stored study {self.options.name!r} was made with {other_code}. If the"
                    " training has changed, the stored trials cannot be compared with new trials:"
                    " choose another storage= for this calibration. If only the code has changed,"
                    " you can ignore this warning."
                )
        self._progress.begin(self.options, trials, price)

    def _begin_heartbeat(self) -> dict[int, int | None]:
        """Start this worker's heartbeat, and return the last heartbeat of each running
        trial.
        """
        running = self.runs().running()
        assert self._study is not None
        self._heartbeat = Heartbeat(self._study)
        self._heartbeat.start()
        return {run.number: run.heartbeat for run in running}

    def _are_heard(self, silent: Mapping[int, int | None]) -> bool:
        """Return whether every running trial has sent a new heartbeat since the
        heartbeats in `silent` were read.
        """
        running = self.runs().running()
        return all(silent.get(run.number, -1) != run.heartbeat for run in running)

    def check_options(self, trials: Trials) -> None:
        """Raise a `CalibrationError` if the options of the first trial in the study
        differ from the current options of `calibrate`.

        If two workers start at the same time, they do not know which of them stored the
        first trial. Every worker therefore compares its options with the first stored
        trial.
        """
        for first in trials[:1]:
            self.check_comparable(first.made_with, self._made_with)

    def check_comparable(
        self, stored: Mapping[str, object], now: Mapping[str, object]
    ) -> None:
        """Raise a `CalibrationError` if stored and new trials cannot be compared
        because their settings differ.
        """
        if other_settings := differences(stored, now):
            raise CalibrationError(
                f"The stored study {self.options.name!r} was made with {other_settings}. Its"
                " trials cannot be compared with new trials.",
                "Choose another storage= for this calibration, or call calibrate() with the same"
                " arguments as for the stored study.",
            )

    def close(self) -> None:
        """Mark this worker's unfinished trial as failed, and close the storage and the
        process group.

        Ctrl-C takes effect only after the trial was marked as failed, but a second
        Ctrl-C interrupts immediately. If the storage does not work, the trial cannot be
        marked, but other workers notice that the heartbeats of the trial have stopped.
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
        """Return all trials of the calibration so far, including the trials of other
        workers.
        """
        if self._study is None:
            return Trials()
        runs = []
        for stored in self._study.get_trials(deepcopy=False):
            run = self._ended.get(stored.number) or Run.read(stored)
            # a finished run no longer changes, so it is converted only once
            if run.state.is_finished():
                self._ended[run.number] = run
            runs.append(run)
        return Trials(runs)

    def calibration(self) -> Calibration | None:
        """Return the `Calibration` that fits all trials, or None if no trial has built
        its model yet.
        """
        if self._calibration is None:
            builds = [run.build for run in self.runs() if run.build]
            if builds:
                self._calibration = Calibration(self.options, builds[0], self.runs)
        return self._calibration

    def next(self) -> Setting | None:
        """Return the rank and random seed of the next trial, or None when the search is
        complete.

        At the end of the search, this method waits until the trials of other workers
        have ended. If another worker dies, this worker repeats the dead worker's trial.
        """
        self.wait(self._may_go_on)
        return self.lead(self._due)

    def _may_go_on(self) -> bool:
        return self._due() is not None or not self.runs().running()

    def _due(self) -> Setting | None:
        return next_setting(self.options, self.runs())

    def begin_trial(self, setting: Setting) -> optuna.trial.Trial:
        """Create a running trial with the given rank and seed in Optuna's storage."""
        made_with = {**self._made_with, **self._code}
        attributes = {**setting._asdict(), "heartbeat": 0, "made_with": made_with}
        assert self._study is not None
        assert self._heartbeat is not None
        trial = begin_trial(self._study, attributes)
        self._heartbeat.trial = trial
        return trial

    def end_trial(self, state: TrialState, value: float | None = None) -> None:
        """Store the final state of this worker's trial, such as COMPLETE or FAIL, and
        the trial's score.

        The state and score are not stored if another worker has already marked this
        trial as failed.
        """
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
        """Fit the losses of all trials so far, and return a recipe with the best
        learning rate.
        """
        recipe = self.lead(self._recipe)
        if self.replicas.leads:
            for reason_and_remedy in filter(recipe.notes.__contains__, DOUBTS):
                warn(f"Recipe {recipe.name!r} may be wrong: {reason_and_remedy}.")
        return recipe

    def _recipe(self) -> Recipe:
        self.check_options(self.runs())  # another worker may have run all of them
        calibration = self.calibration()
        if calibration is None:
            refuse_ends(self.runs().counted())
        return calibrated_recipe(calibration, {"train": self._source["train"]})

    def interrupted(self) -> CalibrationInterrupted:
        """Return the error that is raised after Ctrl-C. This error contains a recipe
        that was computed from the finished trials.
        """
        with self._guard():
            ended = self.runs().counted()
            fit = "The recipe of these trials is the attribute `recipe` of this error."
            if not ended:
                fit = "No trial has finished yet, so no recipe is available."
            error = CalibrationInterrupted(
                f"The calibration was interrupted after {len(ended)} of"
                f" {self.options.runs} trials.",
                f"{fit} If you passed storage=, repeat the same call to continue the search.",
            )
            with suppress(CalibrationError):
                error.recipe = self._recipe()
            return error


# --- what runs are made with ----------------------------------------------------------------------


def source_of(train: Callable[..., object]) -> dict[str, str]:
    """Return the name of a training function and a hash of its source code.

    If the function is wrapped in decorators or in `functools.partial`, the wrapped
    function is used. The hash is left out if the source code cannot be read. Recipes
    record the name. Stored studies also record the hash, so that the user is warned if
    the code of the training function has changed.
    """
    function = inspect.unwrap(train)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    if not hasattr(function, "__qualname__"):
        function = type(function)
    source = {"train": function.__qualname__}
    # SyntaxError and TokenError occur if the file was edited after it was imported: then
    # the line at which the function began contains other text.
    with suppress(OSError, TypeError, SyntaxError, TokenError):
        text = inspect.getsource(function)
        source["hash"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return source


def made_with(options: Options) -> dict[str, Any]:
    """Return the options of `calibrate` that must be the same in all trials of a
    study.
    """
    return {
        "schema": _SCHEMA,
        "steps": options.steps,
        "ranks": options.lora,
        "seeds": sorted(options.seeds),
        "optimizer": options.optimizer_name,
        "batch": options.batch,
        "law": plain_value(options.law),
    }
