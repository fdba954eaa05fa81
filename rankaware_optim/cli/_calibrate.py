"""`rankaware calibrate`: a calibration that can be resumed, with one or more workers."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import click
import torch

from .. import calibration
from ..errors import CalibrationError, RankAwareError, RankAwareWarning, RecipeError
from ..laws import PRIOR_LAW
from ..recipe import Recipe
from ._echo import echo, warnings_as_notes
from ._options import OPTIMIZER, in_options, may_name_module, numbers, out_option
from ._placement import (
    AUTO,
    THREADS,
    chosen_devices,
    in_environment,
    machine_cores,
    machine_devices,
    outside_folder,
    placed,
    started_outside_folder,
)


def _count_or_auto(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Read a whole number of at least 1, or the word "auto" as AUTO. A click callback."""
    if text is None:
        return None
    return AUTO if text == "auto" else int(click.IntRange(1)(text, param, ctx))


_GRACE_S = 10.0  # seconds for a worker to end by itself
_WORKERS = (
    "Number of worker processes on this machine. auto is one per visible GPU, or one per two cores"
    " without GPUs. By default 1, or auto with --devices."
)
_RAY = (
    "Run the workers on the Ray cluster at ADDRESS, one per GPU or as many as --workers. local"
    " starts a cluster here. Every node must be able to reach --storage."
)
_LR_RANGE = (
    "Lowest and highest base rate to try, such as 1e-5,1e-2. Widened if the best rate is at an"
    " edge."
)
_WARMUP = (
    "Warm-up as a share of the steps, 0 to 1. The recipe records it. No trial is pruned before its"
    " end."
)


@click.command()
@click.argument("spec", callback=may_name_module, metavar="MODULE:TRAIN")
@click.option(
    "--ranks",
    required=True,
    callback=numbers(click.INT, {"full": None}),
    help=(
        "Lowest and highest rank that you want to use, such as 1,256. 1,256,full adds full"
        " finetuning."
    ),
)
@click.option("--steps", type=int, required=True, help="Training steps per trial, such as 500.")
@click.option(
    "--target-steps", type=int, help="Training steps of the target run. By default --steps."
)
@out_option(required=True, help="Recipe to write, a .toml file.")
@OPTIMIZER
@click.option(
    "--law",
    callback=may_name_module,
    default=PRIOR_LAW,
    show_default=True,
    help="Law that moves rates between ranks.",
)
@click.option(
    "--trials",
    type=int,
    help="Number of runs at --ranks. By default as --budget allows, or 8 per rank.",
)
@click.option("--budget", type=int, help="Largest number of training steps of all trials together.")
@click.option(
    "--until",
    type=float,
    help="Stop once the 90 % band is narrower than this many octaves (factors of two).",
)
@click.option(
    "--full-trials",
    type=int,
    default=0,
    show_default=True,
    help="Number of full-finetuning runs at the end.",
)
@click.option(
    "--seeds",
    default="0,1",
    show_default=True,
    callback=numbers(click.INT),
    help="Random seeds of the trials, the same at every rank.",
)
@click.option("--lr-range", callback=numbers(click.FLOAT), help=_LR_RANGE)
@click.option(
    "--batch", type=float, help="Examples per step of the target run. The recipe records it."
)
@click.option("--warmup", type=float, help=_WARMUP)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the sampler.")
@click.option(
    "--name", help="Name of the study and of the recipe. By default the name of the recipe's file."
)
@click.option(
    "--storage",
    help="Path of a journal file, or a database URL. By default a journal beside the recipe.",
)
@click.option("--workers", callback=_count_or_auto, help=_WORKERS)
@click.option(
    "--devices",
    callback=numbers(click.STRING),
    help="GPUs to use, such as 0,1. By default all visible ones.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads per worker. By default the workers share the cores.",
)
@click.option("--ray", metavar="ADDRESS", help=_RAY)
def calibrate(spec: str, out: Path, ray: str | None, **options: Any) -> None:
    """Find a learning rate by short runs, and write it as a recipe.

    MODULE:TRAIN is your training loop, a generator function of a trial. MODULE is imported from the
    current directory. Example: rankaware calibrate finetune:train --ranks 4,64 --steps 500 -o
    recipe.toml

    The same command continues a calibration that stopped or was killed. On another machine that can
    reach --storage, it joins the running calibration.
    """
    if out.suffix != ".toml":
        raise RecipeError(
            f"A recipe's file ends in .toml, but {str(out)!r} does not.", "Rename it."
        )
    options |= {
        "name": options["name"] or out.stem,
        "storage": options["storage"] or str(out.with_suffix(".journal")),
    }
    with _sigterm_interrupts():
        if ray is None:
            _on_this_machine(spec, options, out)
        else:
            _write(_on_ray(spec, ray, options), out)


def _on_this_machine(spec: str, options: dict[str, Any], out: Path) -> None:
    """Calibrate with workers on this machine, and write the recipe. This process is the first of
    them.
    """
    count, asked, threads = (options.pop(name) for name in ("workers", "devices", "threads"))
    if count is None:
        count = 1 if asked is None else AUTO
    places = placed(count, chosen_devices(asked, machine_devices()), machine_cores(), threads)
    with in_environment(places[0]):
        load_train(spec)
        own, *others = [_Worker(spec, options, place) for place in places]
        with _helpers(others):
            _write(own.run(), out)  # before it waits for the others to end


def _on_ray(spec: str, address: str, options: dict[str, Any]) -> Recipe:
    """Calibrate with tasks of a Ray cluster. This process waits for them."""
    count, *placement = (options.pop(name) for name in ("workers", "devices", "threads"))
    if any(placement):
        raise CalibrationError(
            "Ray gives the workers their GPUs and threads.", "Leave --devices and --threads out."
        )
    executor = calibration.RayExecutor(count or None, address=address)
    with trials_said(lines=True):
        return calibration.calibrate(load_train(spec), executor=executor, **options)


def _write(recipe: Recipe, out: Path) -> None:
    """Save a recipe and print a summary."""
    own = recipe.at() if recipe.reference.method == "lora" else recipe.at(method="full")
    trials, steps = recipe.tensors["pruned"], int(recipe.tensors["steps"].sum())
    echo(f"{recipe.save(out)}: base rate {recipe.lr:.3g} at {recipe.reference}")
    echo(
        f"90 % band {own.low:.3g} to {own.high:.3g}; {len(trials)} trials, {steps} steps,"
        f" {int(trials.sum())} pruned"
    )
    for note in recipe.notes:
        echo(f"note: {note}")


def load_train(spec: str) -> Any:
    """Return the function "module:function".

    Raises:
        CalibrationError: the module or the function does not exist, or the import fails.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise CalibrationError(
            f"{spec!r} names no function.", "Give module:function, such as finetune:train."
        )
    try:
        found = import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and module.startswith(error.name):
            raise CalibrationError(
                f"There is no module {module!r} in {os.getcwd()} or among the installed packages.",
                "Run the command in the module's folder, and give its name without .py.",
            ) from error
        raise CalibrationError(
            f"{module} cannot be imported: {type(error).__name__}: {error}.",
            f"See `python -c 'import {module}'`.",
        ) from error
    if not callable(getattr(found, name, None)):
        own = [
            key
            for key, value in vars(found).items()
            if getattr(value, "__module__", "") == found.__name__
        ]
        there = ", ".join(sorted(key for key in own if callable(getattr(found, key)))) or "none"
        raise CalibrationError(f"{module} has no function {name!r}.", f"It has {there}.")
    return getattr(found, name)


# --- workers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """One process's part of a calibration: the function's name, the options, its GPUs and threads."""

    spec: str
    options: Mapping[str, Any]
    place: Mapping[str, str]

    def run(self, progress: bool | None = None) -> Recipe:
        """Run trials until the schedule is complete."""
        before = torch.get_num_threads()
        torch.set_num_threads(int(self.place.get(THREADS, before)))
        try:
            with trials_said(lines=not sys.stderr.isatty()):
                return calibration.calibrate(
                    load_train(self.spec), progress=progress, **self.options
                )
        finally:
            torch.set_num_threads(before)

    def help(self) -> None:
        """Run as an additional process. It ends if the command's process is killed."""
        started_outside_folder()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        try:
            with warnings_as_notes():
                # the command's process gives it
                warnings.filterwarnings("ignore", "A budget of", RankAwareWarning)
                self.run(progress=False)
        except KeyboardInterrupt:  # the command's process says it
            sys.exit(1)
        except RankAwareError as error:
            echo(f"note: a worker stopped: {in_options(error, calibrate)}", err=True)
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
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM, which a cluster sends at a time limit, like Ctrl-C, so that the trial is given
    back.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def trials_said(lines: bool) -> Iterator[None]:
    """Hide Optuna's warnings, since our errors contain them. lines: whether to print every finished
    trial.
    """
    from optuna.logging import ERROR, get_verbosity, set_verbosity

    log, handler, said = (
        logging.getLogger("rankaware_optim.calibration"),
        logging.StreamHandler(),
        get_verbosity(),
    )
    level, propagate = log.level, log.propagate
    set_verbosity(ERROR)
    if lines:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    try:
        yield
    finally:
        set_verbosity(said)
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextmanager
def _helpers(workers: Sequence[_Worker]) -> Iterator[None]:
    """Run additional processes on the same study until it is complete or this process fails.

    They inherit that Ctrl-C is ignored. This process handles it and stops them.
    """
    spawn = get_context("spawn")
    made = [
        spawn.Process(target=worker.help, name=f"worker {i}") for i, worker in enumerate(workers, 2)
    ]
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process, worker in zip(made, workers, strict=True):
            with (
                in_environment(worker.place),
                outside_folder(),
            ):  # torch reads the environment when it is imported
                process.start()
    finally:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    except BaseException:
        for process in made:
            process.terminate()
        raise
    finally:
        late = _end(made)
    for process in late:
        echo(f"note: {process.name} did not end within {_GRACE_S:g} s, and was stopped.", err=True)
    for process in made:
        if process.exitcode and process not in late:
            echo(f"note: {process.name} ended early, with exit code {process.exitcode}.", err=True)


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
