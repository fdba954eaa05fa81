"""The workers of a calibration on one machine: their GPUs and threads, and their processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile
from multiprocessing import get_context, parent_process
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from .. import calibration
from .. import recipe as recipes
from ..errors import CalibrationError, RankAwareError, RankAwareWarning
from ._options import echo, warnings_as_notes

DEVICES = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
SAFE_PATH = "PYTHONSAFEPATH"
_OURS = "rankaware"  # its value where we set it
AUTO = 0  # workers: one per GPU, or one per two cores without GPUs
_GRACE_S = 10.0  # seconds for a worker to end by itself

# --- placement ------------------------------------------------------------------------------------


def placed(
    workers: int, devices: Sequence[str], cores: int, threads: int | None = None
) -> list[dict[str, str]]:
    """Return the environment variables of each of `workers` processes.

    GPUs are distributed evenly and in order. If there are more workers than GPUs, neighbours share
    one. Several workers share the cores, unless `threads` is given. A single worker keeps torch's
    default.

    >>> placed(AUTO, ["0", "1"], cores=8)[1]
    {'CUDA_VISIBLE_DEVICES': '1', 'OMP_NUM_THREADS': '4'}
    """
    workers = workers or len(devices) or max(1, cores // 2)
    if threads is None and workers > 1:
        threads = max(1, cores // workers)
    places = []
    for i in range(workers):
        place = {}
        if devices:
            start, end = i * len(devices) // workers, (i + 1) * len(devices) // workers
            place[DEVICES] = ",".join(devices[start : max(end, start + 1)])
        if threads is not None:
            place[THREADS] = str(threads)
        places.append(place)
    return places


def visible_devices(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the GPUs that this process may use: their names in CUDA_VISIBLE_DEVICES, or numbers if
    it is not set.

    count: the number of GPUs that torch finds, 0 if unknown.

    Raises:
        CalibrationError: the variable has GPUs that do not exist.
    """
    if DEVICES not in environment:
        return [str(i) for i in range(count)]
    given = map(str.strip, environment[DEVICES].split(","))
    # as CUDA reads it
    names = list(takewhile(lambda name: name not in ("", "-1"), given))
    if 0 < count < len(names):
        raise CalibrationError(
            f"{DEVICES} is {environment[DEVICES]!r}, but torch finds {count} of these GPUs.",
            "Give only existing GPUs.",
        )
    return names


def chosen_devices(chosen: Sequence[str] | None, visible: Sequence[str]) -> list[str]:
    """Return the GPUs that the user chose, by default all visible ones.

    Raises:
        CalibrationError: one does not exist, or is given twice.
    """
    if chosen is None:
        return list(visible)
    absent = [name for name in chosen if name not in visible]
    if absent:
        there = (
            f"the visible ones are {', '.join(visible)}"
            if visible
            else "no GPU is visible"
        )
        raise CalibrationError(
            f"There is no GPU {', '.join(absent)} here: {there}.",
            "Give others, or leave --devices out.",
        )
    if len(set(chosen)) < len(chosen):
        raise CalibrationError(
            f"--devices {','.join(chosen)} has a GPU twice.", "Give each once."
        )
    return list(chosen)


def machine_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def in_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore them afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def outside_folder() -> AbstractContextManager[None]:
    """Start workers that import nothing from the current folder while they start. Python 3.10 has
    no way to say so.
    """
    return in_environment({} if SAFE_PATH in os.environ else {SAFE_PATH: _OURS})


# --- processes ------------------------------------------------------------------------------------


def load_train(spec: str) -> Any:
    """Return the function "module:function".

    Raises:
        CalibrationError: the module or the function does not exist, or the import fails.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise CalibrationError(
            f"{spec!r} names no function.",
            "Give module:function, such as finetune:train.",
        )
    module = _imported(module_name)
    train = getattr(module, name, None)
    if not callable(train):
        functions = sorted(
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        )
        raise CalibrationError(
            f"{module_name} has no function {name!r}.",
            f"It has {', '.join(functions) or 'none'}.",
        )
    return train


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except Exception as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and name.startswith(error.name)
        ):
            raise CalibrationError(
                f"There is no module {name!r} in {os.getcwd()} or among the installed packages.",
                "Run the command in the module's folder, and give its name without .py.",
            ) from error
        raise CalibrationError(
            f"{name} cannot be imported: {type(error).__name__}: {error}.",
            f"See `python -c 'import {name}'`.",
        ) from error


@dataclass(frozen=True)
class Worker:
    """One process of a calibration: its function's name, the options, its GPUs and threads."""

    spec: str
    options: Mapping[str, Any]
    place: Mapping[str, str]

    def run(self, progress: bool = True) -> recipes.Recipe:
        """Run trials until the schedule is complete."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(int(self.place.get(THREADS, before)))
        try:
            with trials_logged():
                return calibration.calibrate(
                    load_train(self.spec), progress=progress, **self.options
                )
        finally:
            torch.set_num_threads(before)

    def help(self) -> None:
        """Run as an additional process. It ends if the command's process is killed."""
        if os.environ.get(SAFE_PATH) == _OURS:
            # the processes that it starts find their modules as usual
            del os.environ[SAFE_PATH]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        try:
            with warnings_as_notes():
                # the command's process gives this one
                warnings.filterwarnings("ignore", "A budget of", RankAwareWarning)
                self.run(progress=False)
        except KeyboardInterrupt:  # the command's process says it
            # It also stops this one, which may have had the cluster's signal already.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.exit(1)
        except RankAwareError as error:
            echo(f"note: a worker stopped: {error}", err=True)
            sys.exit(1)


def _leave_with_parent() -> None:
    """End this process when the command's process has ended. Its trial is given back, if it can
    still do so.
    """
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os._exit(1)


@contextmanager
def trials_logged() -> Iterator[None]:
    """Hide Optuna's warnings, since our errors contain them, and print every finished trial where
    there is no terminal, which has a bar.
    """
    from optuna.logging import ERROR, get_verbosity, set_verbosity

    log = logging.getLogger("rankaware_optim.calibration")
    handler = logging.StreamHandler()
    before = get_verbosity(), log.level, log.propagate
    set_verbosity(ERROR)
    if not sys.stderr.isatty():
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        set_verbosity(before[0])
        log.setLevel(before[1])
        log.propagate = before[2]


@contextmanager
def helped_by(workers: Sequence[Worker]) -> Iterator[None]:
    """Run additional processes on the same study until it is complete or this process fails.

    They inherit that Ctrl-C is ignored. This process handles it and stops them.
    """
    spawn = get_context("spawn")
    processes = []
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for i, worker in enumerate(workers, 2):
            processes.append(spawn.Process(target=worker.help, name=f"worker {i}"))
            # torch reads the environment when it is imported
            with in_environment(worker.place), outside_folder():
                processes[-1].start()
    finally:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        late = _end(processes)
    for process in processes:
        if process in late:
            what = f"did not end within {_GRACE_S:g} s, and was stopped"
        elif process.exitcode:
            what = f"ended early, with exit code {process.exitcode}"
        else:
            continue
        echo(f"note: {process.name} {what}.", err=True)


def _end(processes: Sequence[SpawnProcess]) -> list[SpawnProcess]:
    """Wait for processes to end by themselves, but not for ever. Return those that had to be
    stopped.
    """
    _join(processes)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.terminate()
    _join(late)
    for process in late:
        process.kill()  # also ends one that is suspended
        process.join()
    return late


def _join(processes: Sequence[SpawnProcess]) -> None:
    """Wait until processes have ended, for `_GRACE_S` in all."""
    until = time.monotonic() + _GRACE_S
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
