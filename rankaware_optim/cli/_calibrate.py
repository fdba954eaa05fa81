"""The command `rankaware calibrate`: a calibration that goes on where it stopped, by as many workers as wanted."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from ..errors import CalibrationError, RankAwareError, RecipeError
from ..recipe import Recipe

__all__ = ["calibrate", "load_train"]


def _numbers(kind: type, named: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Reads "4,64" as a tuple of numbers; a word in `named` stands for its value."""

    def read(context: click.Context, param: click.Parameter, text: str | None) -> tuple[Any, ...] | None:
        try:
            words = None if text is None else [word.strip() for word in text.split(",")]
            return None if words is None else tuple(named[w] if named and w in named else kind(w) for w in words)
        except ValueError:
            raise click.BadParameter(f"{text!r} is no list of numbers, such as 4,64.") from None

    return read


@click.command()
@click.argument("spec", metavar="MODULE:TRAIN")
@click.option("--ranks", required=True, callback=_numbers(int, {"full": None}), help="As 4,64, or 4,64,full.")
@click.option("--steps", type=int, required=True, help="Training steps a trial.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The recipe's .toml.")
@click.option("--optimizer", default="adamw", show_default=True, help="A name, or package:Class.")
@click.option("--law", default="mua", show_default=True)
@click.option("--trials", type=int, help="Runs at the ranks; by default what the budget pays for, or 8 a rank.")
@click.option("--budget", type=int, help="Training steps in all; never exceeded.")
@click.option("--until", type=float, help="End when the 90 % band is narrower than so many octaves.")
@click.option("--full-trials", type=int, default=0, help="Runs of full finetuning at the end.")
@click.option("--target", type=click.Choice(["lora", "full"]), default="lora", show_default=True)
@click.option("--seeds", default="0,1", show_default=True, callback=_numbers(int))
@click.option("--lr-range", callback=_numbers(float), help="Lowest and highest base rate, as 1e-5,1e-2.")
@click.option("--batch", type=float, help="Examples a step; recorded.")
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
    options |= {"name": options["name"] or out.stem, "storage": options["storage"] or str(out.with_suffix(".journal"))}
    threads = threads or (1 if workers > 1 else None)
    with _helpers(workers - 1, spec, options, threads):
        recipe = _work(spec, options, threads)
    click.echo(_said(recipe, recipe.save(out)))


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
    found = _imported(module)
    if not callable(getattr(found, name, None)):
        own = [key for key, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__]
        there = ", ".join(sorted(key for key in own if callable(getattr(found, key)))) or "none"
        raise CalibrationError(f"{module} holds no function {name!r}.", f"Its own are: {there}.")
    return getattr(found, name)


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise CalibrationError(
                f"There is no module {module!r} in {os.getcwd()} or among the installed packages.",
                "Run the command where the module lies, and name it without .py.",
            ) from error
        raise _broken(module, error) from error
    except Exception as error:
        raise _broken(module, error) from error


def _broken(module: str, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"{module} cannot be imported: {type(error).__name__}: {error}.", f"See `python -c 'import {module}'`."
    )


def _work(spec: str, options: Mapping[str, Any], threads: int | None, progress: bool | None = None) -> Recipe:
    """One worker's part: trials until the plan is fulfilled."""
    import torch
    from optuna import logging

    from ..calibration import calibrate as run

    before, said = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(threads or before)
    logging.set_verbosity(logging.ERROR)  # what Optuna warns of on its way, our error says in a sentence
    try:
        return run(load_train(spec), progress=progress, **options)
    finally:
        torch.set_num_threads(before)
        logging.set_verbosity(said)


# --- helpers --------------------------------------------------------------------------------------------------------


@contextmanager
def _helpers(count: int, spec: str, options: Mapping[str, Any], threads: int | None) -> Iterator[None]:
    """`count` further processes that work on the same study until it is done, or this one fails."""
    spawn = get_context("spawn")
    made = [spawn.Process(target=_help, args=(spec, options, threads), name=f"worker {i + 2}") for i in range(count)]
    with _environment(threads):
        for process in made:
            process.start()
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
            click.echo(f"note: {process.name} ended early, with code {process.exitcode}.", err=True)


@contextmanager
def _environment(threads: int | None) -> Iterator[None]:
    """OMP_NUM_THREADS for the processes started within; torch reads it when it is imported."""
    before = os.environ.get("OMP_NUM_THREADS")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})


def _help(spec: str, options: Mapping[str, Any], threads: int | None) -> None:
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        _work(spec, options, threads, progress=False)
    except RankAwareError as error:
        click.echo(f"note: a worker stopped: {error}", err=True)
        sys.exit(1)


def _leave_with_parent(parent: int) -> None:
    """A worker whose command was killed ends too: its trial is run again by the next command."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _said(recipe: Recipe, path: Path) -> str:
    own = recipe.at() if recipe.reference.method == "lora" else recipe.at(method="full")
    trials = recipe.tensors
    lines = [
        f"{path}: base rate {recipe.lr:.3g} at {recipe.reference}",
        f"90 % band {own.low:.3g} to {own.high:.3g}; {len(trials['lr'])} trials, {int(trials['steps'].sum())} steps, "
        f"{int(trials['pruned'].sum())} pruned",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in recipe.notes)])
