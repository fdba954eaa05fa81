"""`rankaware calibrate`: a calibration that can be resumed, with one or more workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .. import calibration
from ..errors import CalibrationError, RecipeError
from ..laws import PRIOR_LAW
from ..recipe import Recipe
from ._echo import echo
from ._options import (
    OPTIMIZER,
    OrWord,
    Several,
    law_option,
    may_name_module,
    out_option,
)
from ._workers import (
    AUTO,
    Worker,
    chosen_devices,
    helped_by,
    in_environment,
    load_train,
    machine_cores,
    machine_devices,
    placed,
    trials_logged,
)

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
    type=Several(OrWord(click.INT, full=None)),
    help=(
        "Lowest and highest rank that you want to use, such as 1,256. 1,256,full adds full"
        " finetuning."
    ),
)
@click.option(
    "--steps", type=int, required=True, help="Training steps per trial, such as 500."
)
@click.option(
    "--target-steps",
    type=int,
    help="Training steps of the target run. By default --steps.",
)
@out_option(required=True, help="Recipe to write, a .toml file.")
@OPTIMIZER
@law_option("Law that moves rates between ranks.", default=PRIOR_LAW)
@click.option(
    "--trials",
    type=int,
    help="Number of runs at --ranks. By default as --budget allows, or 8 per rank.",
)
@click.option(
    "--budget",
    type=int,
    help="Largest number of training steps of all trials together.",
)
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
    type=Several(click.INT),
    help="Random seeds of the trials, the same at every rank.",
)
@click.option("--lr-range", type=Several(click.FLOAT), help=_LR_RANGE)
@click.option(
    "--batch",
    type=float,
    help="Examples per step of the target run. The recipe records it.",
)
@click.option("--warmup", type=float, help=_WARMUP)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed of the sampler."
)
@click.option(
    "--name",
    help="Name of the study and of the recipe. By default the name of the recipe's file.",
)
@click.option(
    "--storage",
    help="Path of a journal file, or a database URL. By default a journal beside the recipe.",
)
@click.option("--workers", type=OrWord(click.IntRange(1), auto=AUTO), help=_WORKERS)
@click.option(
    "--devices",
    type=Several(click.STRING),
    help="GPUs to use, such as 0,1. By default all visible ones.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads per worker. By default the workers share the cores.",
)
@click.option("--ray", metavar="ADDRESS", help=_RAY)
def calibrate(
    spec: str,
    out: Path,
    ray: str | None,
    workers: int | None,
    devices: Sequence[str] | None,
    threads: int | None,
    **options: Any,
) -> None:
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
    options["name"] = options["name"] or out.stem
    options["storage"] = options["storage"] or str(out.with_suffix(".journal"))
    with _sigterm_interrupts():
        if ray is not None:
            if devices or threads:
                raise CalibrationError(
                    "Ray gives the workers their GPUs and threads.",
                    "Leave --devices and --threads out.",
                )
            executor = calibration.RayExecutor(workers or None, address=ray)
            with trials_logged(lines=True):
                recipe = calibration.calibrate(
                    load_train(spec), executor=executor, **options
                )
            _write(recipe, out)
            return
        if workers is None:
            workers = 1 if devices is None else AUTO
        visible = chosen_devices(devices, machine_devices())
        places = placed(workers, visible, machine_cores(), threads)
        with in_environment(places[0]):
            load_train(spec)
            this_process, *others = [Worker(spec, options, place) for place in places]
            with helped_by(others):
                _write(this_process.run(), out)  # before it waits for the others to end


def _write(recipe: Recipe, out: Path) -> None:
    """Save a recipe and print a summary."""
    rate = (
        recipe.at() if recipe.reference.method == "lora" else recipe.at(method="full")
    )
    pruned, steps = recipe.tensors["pruned"], int(recipe.tensors["steps"].sum())
    echo(f"{recipe.save(out)}: base rate {recipe.lr:.3g} at {recipe.reference}")
    echo(
        f"90 % band {rate.low:.3g} to {rate.high:.3g}; {len(pruned)} trials, {steps} steps,"
        f" {int(pruned.sum())} pruned"
    )
    for note in recipe.notes:
        echo(f"note: {note}")


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
