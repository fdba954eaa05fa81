"""The command that makes a recipe by trials: `rankaware calibrate`, with one or more workers.

The function behind it is in `rankaware_optim/_calibrate.py`.
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
_GRACE_S = 10.0  # for a worker to end by itself


@click.command()
@click.argument("spec", callback=may_name_module, metavar="MODULE:TRAIN")
@option(
    "--ranks",
    several(int),
    "Lowest and highest rank that you want to use, such as 1,256. 1,256,full adds full finetuning.",
    required=True,
)
@option("--steps", int, "Training steps per trial, such as 500.", required=True)
@option("--target-steps", int, "Training steps of the target run. By default --steps.")
@out_option("Recipe to write, a .toml file.", required=True)
@FORCE
@OPTIMIZER
@law_option("Law that moves rates between ranks.", PRIOR_LAW)
@option(
    "--trials",
    int,
    f"Number of runs at --ranks. By default {calibration.TRIALS_PER_RANK} per rank.",
)
@option("--full-trials", int, "Number of full-finetuning runs at the end.", default=0)
@option(
    "--seeds",
    several(int),
    "Random seeds of the trials, the same at every rank.",
    default=",".join(map(str, calibration.SEEDS)),
)
@option(
    "--lr-range",
    several(float),
    "Lowest and highest base rate to try, such as 1e-5,1e-2. The first run is in their middle."
    " Widened if the best rate is at an edge.",
)
@option(
    "--batch",
    float,
    "Examples per step of the target run. The recipe records it.",
)
@option(
    "--name",
    str,
    "Name of the recipe, and of the study in a database. By default the name of the recipe's file.",
)
@option(
    "--storage",
    str,
    "Path of a journal file, or a database URL. By default a journal beside the recipe.",
)
@option(
    "--workers",
    click.IntRange(1),
    "Run this command so many times at once, each on a GPU of its own if there are any.",
    default=1,
)
@flag("--dry-run", "Print what the trials cost, and train nothing.")
@flag("--quiet", "Print nothing but errors, and warnings of MODULE.")
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

    MODULE:TRAIN is your training loop, a generator function of a trial, or a function of it that
    returns a trainer. MODULE is imported from the current directory. Example: rankaware calibrate
    finetune:train --ranks 4,64 --steps 500 -o recipe.toml

    The same command continues a calibration that stopped or was killed. On another machine that can
    reach --storage, it joins the running calibration.
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
            "Remove that call: return from the function to end a trial.",
        ) from error
    recipe = replace(recipe, name=name)
    recipe.save(out)
    if not quiet:
        echo(recipe)


def _interrupt(number: int, _: object) -> None:
    """Treat SIGTERM, which a cluster sends at a time limit, like Ctrl-C, so that the trial is given
    back. It counts once.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def load_train(spec: str) -> Any:
    """Return the function "module:function".

    Raises:
        CalibrationError: the module or the function does not exist, or the import fails.
    """
    try:
        return resolve_name(spec)
    except (Exception, SystemExit) as error:  # a script may call sys.exit() at its end
        raise CalibrationError(
            f"{spec!r} is no function that can be imported: {type(error).__name__}: {error}.",
            "Give module:function, such as finetune:train, and run the command in the module's"
            " folder.",
        ) from error


# --- workers --------------------------------------------------------------------------------------


def run_workers(count: int, storage: str) -> int:
    """Run this command `count` times at once, worker i with GPU i, and return the first one's exit
    code.

    The workers share the study in `storage`. Each writes the recipe, and the first one prints it.
    When the first one has ended, the others get a few seconds to end too, and are then stopped.

    Raises:
        CalibrationError: a signal from outside killed the first worker, so no recipe was printed.
    """
    if "calibrate" not in sys.orig_argv:
        raise CalibrationError(
            "--workers runs the command of this process again, and it is not rankaware's.",
            "Run rankaware calibrate in a shell.",
        )
    command = [sys.executable, *sys.orig_argv[1:], "--workers", "1", "--force"]
    # The workers inherit that Ctrl-C is ignored. This process passes it on.
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
    if code < 0:
        raise CalibrationError(
            f"{killed[0]}, so the other workers were stopped. The finished trials are in"
            f" {storage}.",
            "Run the same command again: it continues from there.",
        )
    for sentence in killed:
        echo_note(f"{sentence}. The other workers ran the rest of the trials.")
    return code


def _environments(count: int) -> list[dict[str, str]]:
    """Return the workers' environments: one visible GPU each, and a share of the CPU threads."""
    import torch

    threads = max(1, torch.get_num_threads() // count)
    all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get(_DEVICES, all_gpus).split(",")
    shared = {"OMP_NUM_THREADS": str(threads), **os.environ}
    return [{**shared, _DEVICES: gpus[i % len(gpus)]} for i in range(count)]


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Wait until a worker has ended, and stop one that does not."""
    for stop in (worker.terminate, worker.kill):
        try:
            worker.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            stop()
