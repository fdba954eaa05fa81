"""The commands that make a recipe: `rankaware calibrate`, which can be resumed and has one or more
workers, and `rankaware fit`.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .. import calibration, sweeps
from .. import recipe as recipes
from ..errors import CalibrationError, RecipeError
from ..laws import PRIOR_LAW
from ._options import (
    ALPHA,
    COLUMN,
    FILE,
    LAW_TEXT,
    OPTIMIZER,
    RECIPE_FIELDS,
    OrWord,
    Several,
    echo,
    echo_result,
    init_option,
    json_option,
    law_option,
    may_name_module,
    option,
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
    placed,
    trials_logged,
    visible_devices,
)


@click.command()
@click.argument("spec", callback=may_name_module, metavar="MODULE:TRAIN")
@option(
    "--ranks",
    Several(OrWord(click.INT, full=None)),
    "Lowest and highest rank that you want to use, such as 1,256. 1,256,full adds full finetuning.",
    required=True,
)
@option("--steps", int, "Training steps per trial, such as 500.", required=True)
@option("--target-steps", int, "Training steps of the target run. By default --steps.")
@out_option("Recipe to write, a .toml file.", required=True)
@OPTIMIZER
@law_option("Law that moves rates between ranks.", PRIOR_LAW)
@option(
    "--trials",
    int,
    "Number of runs at --ranks. By default as --budget allows, or 8 per rank.",
)
@option("--budget", int, "Largest number of training steps of all trials together.")
@option(
    "--until",
    float,
    "Stop once the 90 % band is narrower than a factor of 2 to this power from end to end.",
)
@option("--full-trials", int, "Number of full-finetuning runs at the end.", default=0)
@option(
    "--seeds",
    Several(click.INT),
    "Random seeds of the trials, the same at every rank.",
    default="0,1",
)
@option(
    "--lr-range",
    Several(click.FLOAT),
    "Lowest and highest base rate to try, such as 1e-5,1e-2. Widened if the best rate is at an"
    " edge.",
)
@option(
    "--batch",
    float,
    "Examples per step of the target run. The recipe records it.",
)
@option(
    "--warmup",
    float,
    "Warm-up as a share of the steps, 0 to 1. The recipe records it. No trial is pruned before its"
    " end.",
)
@option("--seed", int, "Random seed of the sampler.", default=0)
@option(
    "--name",
    str,
    "Name of the study and of the recipe. By default the name of the recipe's file.",
)
@option(
    "--storage",
    str,
    "Path of a journal file, or a database URL. By default a journal beside the recipe.",
)
@option(
    "--workers",
    OrWord(click.IntRange(1), auto=AUTO),
    "Number of worker processes on this machine. auto is one per visible GPU, or one per two cores"
    " without GPUs. By default 1, or auto with --devices.",
)
@option(
    "--devices",
    Several(click.STRING),
    "GPUs to use, such as 0,1. By default all visible ones.",
)
@option(
    "--threads",
    click.IntRange(1),
    "CPU threads per worker. By default the workers share the cores.",
)
@option(
    "--ray",
    str,
    "Run the workers on the Ray cluster at ADDRESS, one per GPU or as many as --workers. local"
    " starts a cluster here. Every node must be able to reach --storage.",
    metavar="ADDRESS",
)
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
            _write(_on_ray(spec, ray, workers, options), out)
            return
        if workers is None:
            workers = 1 if devices is None else AUTO
        import torch

        # CUDA is not initialised yet, since it reads CUDA_VISIBLE_DEVICES only once
        visible = visible_devices(os.environ, torch.cuda.device_count())
        visible = chosen_devices(devices, visible)
        places = placed(workers, visible, machine_cores(), threads)
        with in_environment(places[0]):
            load_train(spec)
            this_process, *others = [Worker(spec, options, place) for place in places]
            with helped_by(others):
                _write(this_process.run(), out)  # before it waits for the others to end


def _on_ray(
    spec: str, address: str, workers: int | None, options: dict[str, Any]
) -> recipes.Recipe:
    executor = calibration.RayExecutor(workers or None, address=address)
    with trials_logged():
        return calibration.calibrate(load_train(spec), executor=executor, **options)


def _write(recipe: recipes.Recipe, out: Path) -> None:
    """Save a recipe and print a summary."""
    rate = recipe.at(method=recipe.reference.method)
    pruned, steps = recipe.tensors["pruned"], int(recipe.tensors["steps"].sum())
    echo(f"{recipe.save(out)}: base rate {recipe.lr:.3g} at {recipe.reference}")
    echo(
        f"90 % band {rate.band}; {len(pruned)} trials, {steps} steps, {int(pruned.sum())} pruned"
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


@click.command()
@click.argument("sweep", type=FILE)
@out_option("Write the recipe to a .toml file.")
@option("--name", str, "Name of the recipe. By default the name of SWEEP's file.")
@OPTIMIZER
@law_option(f"Law that moves rates between ranks. {LAW_TEXT}", PRIOR_LAW)
@option(
    "--fit",
    click.Choice(["drift", "tokens"]),
    "How the law is corrected. drift: by a power of the rank. tokens: by mua's number of effective"
    " tokens.",
    default="drift",
)
@option("--model", str, "Model of the rows to fit, and of rows without one.")
@ALPHA
@init_option("This is the init of the rows to fit, and of rows without one.")
@option("--fan-in", float, "Mean fan-in of the adapted layers, for rows without one.")
@option(
    "--full-fan-in",
    float,
    "Largest fan-in, for full finetuning. By default --fan-in.",
)
@option("--batch", float, "Batch size of the rows to fit, and of rows without one.")
@option("--steps", int, "Training steps of the rows to fit, and of rows without them.")
@option(
    "--warmup",
    float,
    "Warm-up as a share of the steps, 0 to 1. The recipe records it.",
)
@COLUMN
@json_option(RECIPE_FIELDS)
def fit(
    sweep: Path,
    out: Path | None,
    name: str | None,
    law: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a recipe to a sweep of learning rates from any tool.

    SWEEP is a .csv, .tsv, .json or .jsonl file with one row per run. The columns rank, lr (per
    step) and loss are required. The columns alpha, rslora, init, method, fan_in, seed, model,
    batch, steps and start (the loss before training) are optional. Write diverged as the loss of a
    run that diverged.
    """
    recipe = sweeps.fit_sweep(sweep, name=name or sweep.stem, law=law, **options)
    saved = None if out is None else recipe.save(out)
    # a law that is not registered has no document
    echo_result(as_json, recipe, recipes.to_document(recipe) if as_json else None)
    if saved is not None and not as_json:
        echo(f"Next: rankaware lr {shlex.quote(str(saved))} {_for_a_rate(recipe)}")


def _for_a_rate(recipe: recipes.Recipe) -> str:
    """Return the options with which `rankaware lr` prints a rate of the recipe."""
    rank = max(recipe.ranks, default=None)
    if recipe.scaling_rule == "unknown":
        rank = recipe.reference.rank
    return "--full" if rank is None else f"--rank {rank}"
