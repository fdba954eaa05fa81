"""This module defines `rankaware calibrate`, which runs trials and writes a recipe.

The command `rankaware calibrate` can start several worker processes. It calls the
Python function `calibrate` in `rankaware_optim/_calibrate.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click

from .. import calibration
from ..errors import (
    CalibrationError,
    RankAwareWarning,
)
from ..laws import PRIOR_LAW
from ._options import (
    FORCE,
    INTERRUPTED,
    OPTIMIZER,
    echo,
    echo_note,
    flag,
    law_option,
    may_name_module,
    option,
    out_option,
    refuse_existing,
    several,
)

_DEVICES = "CUDA_VISIBLE_DEVICES"
_GRACE_S = 10.0  # how long a worker may take to end by itself, in seconds


@click.command()
@click.argument("spec", callback=may_name_module, metavar="MODULE:TRAIN")
@option(
    "--ranks",
    several(int),
    "The lowest and the highest rank that you want to use, such as 1,256. Write 1,256,full to"
    " include full finetuning.",
    required=True,
)
@option("--steps", int, "Optimizer steps of a trial, such as 500.", required=True)
@option("--target-steps", int, "Optimizer steps of the real run. By default --steps.")
@out_option("The recipe to write, a .toml file.", required=True)
@FORCE
@OPTIMIZER
@law_option("The scaling law between ranks.", PRIOR_LAW)
@option(
    "--trials",
    int,
    f"Number of trials at --ranks. By default {calibration.TRIALS_PER_RANK} per rank.",
)
@option(
    "--full-trials",
    int,
    "Number of trials of full finetuning, which run after the trials of LoRA.",
    default=0,
)
@option(
    "--seeds",
    several(int),
    "Random seeds of the trials. Every rank uses the same seeds.",
    default=",".join(map(str, calibration.SEEDS)),
)
@option(
    "--lr-range",
    several(float),
    "The lowest and the highest learning rate to try, such as 1e-5,1e-2. The first trial is in the"
    " middle. The range is widened if the best learning rate is at one of its ends.",
)
@option(
    "--batch",
    float,
    "Examples per step of the real run. The recipe records this number.",
)
@option(
    "--name",
    str,
    "Name of the recipe, and of the study in a database. By default the name of the recipe's file.",
)
@option(
    "--storage",
    str,
    "Path of a journal file, or URL of a database, in which finished trials are stored. By default"
    " a journal beside the recipe.",
)
@option(
    "--workers",
    click.IntRange(1),
    "Number of processes that run trials at the same time. If there are GPUs, each process uses a"
    " different GPU.",
    default=1,
)
@flag("--dry-run", "Print the cost of the trials without training.")
@flag("--quiet", "Print only errors, and the warnings of MODULE.")
@click.pass_context
def calibrate(
    ctx: click.Context,
    /,
    spec: str,
    out: Path,
    force: bool,
    workers: int,
    name: str | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the best learning rate with short training runs, and write it to a recipe file.

    MODULE:TRAIN names your training function. Your training function gets a trial, and
    either yields losses or returns a trainer. The Python module MODULE is imported from
    the current folder. Example: rankaware calibrate finetune:train --ranks 4,64 --steps
    500 -o recipe.toml

    If a calibration was stopped or killed, run the same command again to continue it. To share the
    trials of a running calibration, run the command on another machine that can reach --storage.
    """
    refuse_existing(out, force)
    name = name or out.stem
    storage = options["storage"] or str(out.with_suffix(".journal"))
    options["storage"] = f"{storage}#{name}" if "://" in storage else storage
    if dry_run:
        load_train(spec)
        del options["storage"]
        echo(f"{spec}: {calibration.Options(**options).price}")
        return
    signal.signal(signal.SIGTERM, _interrupt)
    if workers > 1:
        ctx.exit(run_workers(workers, options["storage"]))
    if quiet:
        warnings.simplefilter("ignore", RankAwareWarning)
    try:
        from .._calibrate import calibrate as run_trials

        recipe = run_trials(load_train(spec), progress=not quiet, **options)
    except KeyboardInterrupt:
        if quiet:
            ctx.exit(INTERRUPTED)
        raise
    except SystemExit as error:
        raise CalibrationError(
            f"{spec} called sys.exit({error.code!r}) during a trial, so no recipe was written.",
            "Remove the call of sys.exit. To end a trial, return from the function.",
        ) from error
    recipe = replace(recipe, name=name)
    recipe.save(out)
    if not quiet:
        echo(recipe)


def _interrupt(number: int, _: object) -> None:
    """Handle SIGTERM like Ctrl-C, so that another worker can run the interrupted trial.

    A cluster sends SIGTERM when the time limit of a job is reached. A second SIGTERM is ignored.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def load_train(spec: str) -> Any:
    """Import the training function with a name of the form "module:function".

    Raises:
        CalibrationError: the module cannot be imported, or it has no such function.
    """
    try:
        return resolve_name(spec)
    except (Exception, SystemExit) as error:  # a script may call sys.exit() at its end
        kind = type(error).__name__
        raise CalibrationError(
            f"The training function {spec!r} cannot be imported. Python raised {kind}: {error}.",
            "Write module:function, such as finetune:train, and run the command in the folder of"
            " the module.",
        ) from error


# --- workers --------------------------------------------------------------------------------------


def run_workers(count: int, storage: str) -> int:
    """Start several worker processes and return the exit code of the first worker.

    Every worker runs the command `rankaware calibrate` with one visible GPU, and all
    workers share the study in `storage`. Every worker writes the recipe to its file,
    but only the first worker prints the recipe. When the first worker has ended, the
    other workers get a few seconds to end before the command stops them.

    Raises:
        CalibrationError: a signal from outside killed the first worker, so no recipe was printed.
    """
    if "calibrate" not in sys.orig_argv:
        raise CalibrationError(
            "--workers can only be used if this process was started with the command rankaware"
            " calibrate.",
            "Run rankaware calibrate in a shell, or remove --workers.",
        )
    command = [sys.executable, *sys.orig_argv[1:], "--workers", "1", "--force"]
    # Ctrl-C reaches every process of a terminal. The workers are started while it is ignored and
    # inherit that, so that only this process sees it, and stops them in order.
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers = []
    for i, environment in enumerate(_environments(count)):
        quiet = ["--quiet"] if i else []
        workers.append(subprocess.Popen([*command, *quiet], env=environment))
    try:
        signal.signal(signal.SIGINT, interrupted)
        code = workers[0].wait()
    except KeyboardInterrupt:
        code = INTERRUPTED
        for worker in workers:
            worker.terminate()
    killed = []
    for number, worker in enumerate(workers, 1):
        ended_by = worker.poll() or 0
        if code != INTERRUPTED and ended_by < 0:
            name = signal.Signals(-ended_by).name
            killed.append(f"Worker {number} of {count} was killed by {name}")
    if code < 0:
        for worker in workers:  # each gives its trial back to the study
            worker.terminate()
        for worker in workers:
            _end(worker)
        name = signal.Signals(-code).name
        raise CalibrationError(
            f"Worker 1 of {count} was killed by {name}, so the other workers were stopped. The"
            f" finished trials are stored in {storage}.",
            "Run the same command again to continue the calibration.",
        )
    for worker in workers:
        _end(worker)
    for sentence in killed:
        echo_note(f"{sentence}. The other workers ran the rest of the trials.")
    return code


def _environments(count: int) -> list[dict[str, str]]:
    """Return the environment variables that assign one GPU and some CPU threads to each
    worker process.
    """
    import torch

    threads = max(1, torch.get_num_threads() // count)
    all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get(_DEVICES, all_gpus).split(",")
    shared = {"OMP_NUM_THREADS": str(threads), **os.environ}
    return [{**shared, _DEVICES: gpus[i % len(gpus)]} for i in range(count)]


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Wait until a worker process has ended. If the process does not end, terminate or
    kill it.
    """
    for stop in (worker.terminate, worker.kill):
        try:
            worker.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            stop()
