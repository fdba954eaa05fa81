"""The command `rankaware calibrate`: a calibration that goes on where it stopped, by as many workers as wanted."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch

from .. import calibration
from ..errors import CalibrationError, RankAwareError, RecipeError
from ..recipe import Recipe
from ._echo import echo
from ._options import OPTIMIZER, in_options, numbers, out_option
from ._placement import AUTO, THREADS, chosen_devices, in_environment, machine_cores, machine_devices, placed


def _count_or_auto(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """A callback that reads a whole number of at least 1, or the word "auto" as AUTO."""
    if text is None:
        return None
    return AUTO if text == "auto" else int(click.IntRange(1)(text, param, ctx))


_WORKERS = (
    "Processes on this machine, as 4, or auto: one a visible GPU, without GPUs one for every two cores. "
    "By default 1, with --devices auto."
)
_RAY = (
    "Run the workers on a Ray cluster at this address, one a GPU, or as many as --workers says; local starts one here. "
    "Its nodes need a --storage that all of them reach."
)


@click.command()
@click.argument("spec", metavar="MODULE:TRAIN")
@click.option(
    "--ranks",
    required=True,
    callback=numbers(click.INT, {"full": None}),
    help="The lowest and the highest that you mean to use, as 1,256, or 1,256,full.",
)
@click.option(
    "--steps", required=True, callback=numbers(click.INT), help="Training steps a trial, or several, as 250,1000."
)
@click.option("--target-steps", type=int, help="Of the run that is meant, where trials are shorter.")
@out_option(required=True, help="The recipe's .toml.")
@OPTIMIZER
@click.option("--law", default="mua", show_default=True)
@click.option("--trials", type=int, help="Runs at the ranks; by default what the budget pays for, or 8 a rank.")
@click.option("--budget", type=int, help="Training steps in all; never exceeded.")
@click.option("--until", type=float, help="End when the 90 % band is narrower than so many octaves.")
@click.option("--full-trials", type=int, default=0, help="Runs of full finetuning at the end.")
@click.option("--target", type=click.Choice(["lora", "full"]), default="lora", show_default=True)
@click.option("--seeds", default="0,1", show_default=True, callback=numbers(click.INT))
@click.option("--lr-range", callback=numbers(click.FLOAT), help="Lowest and highest base rate, as 1e-5,1e-2.")
@click.option("--batch", type=float, help="Examples a step; recorded.")
@click.option("--batches", callback=numbers(click.FLOAT), help="Those of trials, where they are others.")
@click.option("--confirm", is_flag=True, help="End with up to three runs of the target's steps.")
@click.option("--warmup", type=float, help="Share of the steps; recorded.")
@click.option("--seed", type=int, default=0, help="Of the sampler.")
@click.option("--name", help="Of the study and the recipe; by default the file's.")
@click.option("--storage", help="A path or a database's URL; by default a journal beside the recipe.")
@click.option("--workers", callback=_count_or_auto, help=_WORKERS)
@click.option("--devices", callback=numbers(click.STRING), help="GPUs to use, as 0,1; by default all that are visible.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of a worker; by default several share the cores.")
@click.option("--ray", metavar="ADDRESS", help=_RAY)
def calibrate(spec: str, out: Path, ray: str | None, **options: Any) -> None:
    """Calibrate MODULE:TRAIN, found from the current directory, and write its recipe.

    The same command goes on where it stopped or was killed, and elsewhere, with a --storage that both reach, joins in.
    """
    if out.suffix != ".toml":
        raise RecipeError(f"A recipe's file ends in .toml, {str(out)!r} does not.", "Name it so.")
    options |= {"batches": options["batches"] or ()}
    options |= {"name": options["name"] or out.stem, "storage": options["storage"] or str(out.with_suffix(".journal"))}
    _write(_on_this_machine(spec, options) if ray is None else _on_ray(spec, ray, options), out)


def _on_this_machine(spec: str, options: dict[str, Any]) -> Recipe:
    """Calibrate by workers here, this process being the first of them."""
    count, asked, threads = (options.pop(name) for name in ("workers", "devices", "threads"))
    if count is None:
        count = 1 if asked is None else AUTO
    places = placed(count, chosen_devices(asked, machine_devices()), machine_cores(), threads)
    with in_environment(places[0]):
        load_train(spec)
        own, *others = [_Worker(spec, options, place) for place in places]
        with _helpers(others):
            return own.run()


def _on_ray(spec: str, address: str, options: dict[str, Any]) -> Recipe:
    """Calibrate by tasks of a Ray cluster, this process waiting for them."""
    count, *placement = (options.pop(name) for name in ("workers", "devices", "threads"))
    if any(placement):
        raise CalibrationError("Ray gives the workers their GPUs and threads.", "Leave devices= and threads= out.")
    executor = calibration.RayExecutor(count or None, address=address)
    with trials_said(lines=True):
        return calibration.calibrate(load_train(spec), executor=executor, **options)


def _write(recipe: Recipe, out: Path) -> None:
    """Save a recipe and say what it holds."""
    own = recipe.at() if recipe.reference.method == "lora" else recipe.at(method="full")
    trials, steps = recipe.tensors["pruned"], int(recipe.tensors["steps"].sum())
    echo(f"{recipe.save(out)}: base rate {recipe.lr:.3g} at {recipe.reference}")
    echo(f"90 % band {own.low:.3g} to {own.high:.3g}; {len(trials)} trials, {steps} steps, {int(trials.sum())} pruned")
    for note in recipe.notes:
        echo(f"note: {note}")


def load_train(spec: str) -> Any:
    """The function named by "module:function", the module found from the current directory.

    Raises:
        CalibrationError: the module or the function is not there, or its import fails.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise CalibrationError(f"{spec!r} names no function.", "Say module:function, such as finetune:train.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and module.startswith(error.name):
            raise CalibrationError(
                f"There is no module {module!r} in {os.getcwd()} or among the installed packages.",
                "Run the command where the module lies, and name it without .py.",
            ) from error
        raise CalibrationError(
            f"{module} cannot be imported: {type(error).__name__}: {error}.", f"See `python -c 'import {module}'`."
        ) from error
    if not callable(getattr(found, name, None)):
        own = [key for key, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__]
        there = ", ".join(sorted(key for key in own if callable(getattr(found, key)))) or "none"
        raise CalibrationError(f"{module} holds no function {name!r}.", f"Its own are: {there}.")
    return getattr(found, name)


# --- workers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """One process's part of a calibration: the function's name, the options, its GPUs and threads."""

    spec: str
    options: Mapping[str, Any]
    place: Mapping[str, str]

    def run(self, progress: bool | None = None) -> Recipe:
        """Run trials until the plan is fulfilled."""
        before = torch.get_num_threads()
        torch.set_num_threads(int(self.place.get(THREADS, before)))
        try:
            with trials_said(lines=not sys.stderr.isatty()):
                return calibration.calibrate(load_train(self.spec), progress=progress, **self.options)
        finally:
            torch.set_num_threads(before)

    def help(self) -> None:
        """Run as a process beside the command's own. Where that is killed, this ends: the trial is run again later."""
        parent = os.getppid()

        def leave_with_parent() -> None:
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(1)

        threading.Thread(target=leave_with_parent, daemon=True).start()
        try:
            self.run(progress=False)
        except RankAwareError as error:
            echo(f"note: a worker stopped: {in_options(str(error), calibrate)}", err=True)
            sys.exit(1)


@contextmanager
def trials_said(lines: bool) -> Iterator[None]:
    """Optuna's warnings are not said, our errors say it in a sentence. lines: say every trial that ended."""
    from optuna.logging import ERROR, get_verbosity, set_verbosity

    log, handler, said = logging.getLogger("rankaware_optim.calibration"), logging.StreamHandler(), get_verbosity()
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
    """Further processes that work on the same study until it is done, or this one fails.

    They ignore Ctrl-C from their first moment, as started by a process that does: this one hears it and ends them.
    """
    spawn = get_context("spawn")
    made = [spawn.Process(target=worker.help, name=f"worker {i}") for i, worker in enumerate(workers, 2)]
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process, worker in zip(made, workers, strict=True):
            with in_environment(worker.place):  # torch reads it when it is imported
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
        for process in made:
            process.join()
    for process in made:
        if process.exitcode:
            echo(f"note: {process.name} ended early, with code {process.exitcode}.", err=True)
