"""This module defines `rankaware calibrate`, which runs trials and writes a recipe.

The command can start several worker processes. It calls the Python function in
`rankaware_optim/_calibrate.py`.
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
    "Number of trials of full finetuning, after the others.",
    default=0,
)
@option(
    "--seeds",
    several(int),
    "Random seeds of the trials. Every rank uses the same ones.",
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
    "Examples per step of the real run. The recipe records it.",
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
    "Number of processes that run trials at the same time, each on a GPU of its own if there are"
    " GPUs.",
    default=1,
)
@flag("--dry-run", "Print what the trials would cost, and do not train.")
@flag("--quiet", "Print only errors, and warnings of MODULE.")
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
    """Find a learning rate by short runs, and write it as a recipe.

    MODULE:TRAIN names your training function. It gets a trial, and is a generator that yields
    losses, or returns a trainer. MODULE is imported from the current folder. Example: rankaware
    calibrate finetune:train --ranks 4,64 --steps 500 -o recipe.toml

    Run the same command again to continue a calibration that was stopped or killed. Run it on
    another machine that can reach --storage to join a calibration that is running.
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
            f"{spec} called sys.exit({error.code!r}) during a trial, so there is no recipe.",
            "Remove that call. To end a trial, return from the function.",
        ) from error
    recipe = replace(recipe, name=name)
    recipe.save(out)
    if not quiet:
        echo(recipe)


def _interrupt(number: int, _: object) -> None:
    """Treat SIGTERM, which a cluster sends at a time limit, like Ctrl-C, so that another worker can
    run the trial. A second SIGTERM is ignored.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def load_train(spec: str) -> Any:
    """Import the function that "module:function" names.

    Raises:
        CalibrationError: the module cannot be imported, or it has no such function.
    """
    try:
        return resolve_name(spec)
    except (Exception, SystemExit) as error:  # a script may call sys.exit() at its end
        raise CalibrationError(
            f"The function {spec!r} cannot be imported: {type(error).__name__}: {error}.",
            "Write module:function, such as finetune:train, and run the command in the folder of"
            " the module.",
        ) from error


# --- workers --------------------------------------------------------------------------------------


def run_workers(count: int, storage: str) -> int:
    """Start several worker processes and return the exit code of the first worker.

    Every worker runs this command with one visible GPU, and all workers share the study in
    `storage`. Every worker writes the recipe, but only the first worker prints it. After the
    first worker has ended, the other workers have a few seconds to end before they are
    stopped.

    Raises:
        CalibrationError: a signal from outside killed the first worker, so no recipe was printed.
    """
    if "calibrate" not in sys.orig_argv:
        raise CalibrationError(
            "--workers can only start workers if this process was started with the command"
            " rankaware calibrate.",
            "Run rankaware calibrate in a shell.",
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
        raise CalibrationError(
            f"{killed[0]}, so the other workers were stopped. The finished trials are in"
            f" {storage}.",
            "Run the same command again: it continues from there.",
        )
    for worker in workers:
        _end(worker)
    for sentence in killed:
        echo_note(f"{sentence}. The other workers ran the rest of the trials.")
    return code


def _environments(count: int) -> list[dict[str, str]]:
    """Return the environment variables that give each worker one GPU and some CPU threads."""
    import torch

    threads = max(1, torch.get_num_threads() // count)
    all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get(_DEVICES, all_gpus).split(",")
    shared = {"OMP_NUM_THREADS": str(threads), **os.environ}
    return [{**shared, _DEVICES: gpus[i % len(gpus)]} for i in range(count)]


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Wait until a worker has ended, and terminate or kill a worker that does not end."""
    for stop in (worker.terminate, worker.kill):
        try:
            worker.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            stop()
