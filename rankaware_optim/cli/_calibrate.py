"""The command `rankaware calibrate`: a calibration that goes on where it stopped, by as many workers as wanted."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
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
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes on this machine.")
@click.option("--threads", type=click.IntRange(1), help="Of each worker; by default one where there are several.")
def calibrate(spec: str, out: Path, workers: int, threads: int | None, **options: Any) -> None:
    """Calibrate MODULE:TRAIN, found from the current directory, and write its recipe.

    The same command goes on where it stopped or was killed, and elsewhere, with a --storage that both reach, joins in.
    """
    if out.suffix != ".toml":
        raise RecipeError(f"A recipe's file ends in .toml, {str(out)!r} does not.", "Name it so.")
    load_train(spec)
    options |= {"batches": options["batches"] or ()}
    options |= {"name": options["name"] or out.stem, "storage": options["storage"] or str(out.with_suffix(".journal"))}
    worker = _Worker(spec, options, threads or (1 if workers > 1 else None))
    with _helpers(worker, workers - 1):
        recipe = worker.run()
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
    """One process's part of a calibration: the function's name, the options, and how many threads it takes."""

    spec: str
    options: Mapping[str, Any]
    threads: int | None

    def run(self, progress: bool | None = None) -> Recipe:
        """Run trials until the plan is fulfilled."""
        from optuna.logging import ERROR, get_verbosity, set_verbosity

        before, said = torch.get_num_threads(), get_verbosity()
        torch.set_num_threads(self.threads or before)
        set_verbosity(ERROR)  # what Optuna warns of on its way, our error says in a sentence
        try:
            with _logged():
                return calibration.calibrate(load_train(self.spec), progress=progress, **self.options)
        finally:
            torch.set_num_threads(before)
            set_verbosity(said)

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
def _logged() -> Iterator[None]:
    """Where standard error is no terminal, a line there for every trial that ended."""
    if sys.stderr.isatty():
        yield
        return
    log, handler = logging.getLogger("rankaware_optim.calibration"), logging.StreamHandler()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextmanager
def _helpers(worker: _Worker, count: int) -> Iterator[None]:
    """`count` further processes that work on the same study until it is done, or this one fails.

    They ignore Ctrl-C from their first moment, as started by a process that does: this one hears it and ends them.
    """
    spawn = get_context("spawn")
    made = [spawn.Process(target=worker.help, name=f"worker {i + 2}") for i in range(count)]
    before, interrupted = os.environ.get("OMP_NUM_THREADS"), signal.signal(signal.SIGINT, signal.SIG_IGN)
    if worker.threads:
        os.environ["OMP_NUM_THREADS"] = str(worker.threads)  # torch reads it when it is imported
    try:
        for process in made:
            process.start()
    finally:
        signal.signal(signal.SIGINT, interrupted)
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
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
