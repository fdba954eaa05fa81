"""`rankaware fit`: fit a recipe to a sweep."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ..laws import PRIOR_LAW
from ..recipe import Recipe, to_document
from ..sweeps import fit_sweep
from ._echo import echo, echo_result
from ._options import (
    ALPHA,
    COLUMN,
    FILE,
    LAW_TEXT,
    OPTIMIZER,
    RECIPE_FIELDS,
    init_option,
    json_option,
    law_option,
    out_option,
)


@click.command()
@click.argument("sweep", type=FILE)
@out_option(help="Write the recipe to a .toml file.")
@click.option("--name", help="Name of the recipe. By default the name of SWEEP's file.")
@OPTIMIZER
@law_option(f"Law that moves rates between ranks. {LAW_TEXT}", default=PRIOR_LAW)
@click.option(
    "--fit",
    type=click.Choice(["drift", "tokens"]),
    default="drift",
    show_default=True,
    help=(
        "How the law is corrected. drift: by a power of the rank. tokens: by mua's number of"
        " effective tokens."
    ),
)
@click.option("--model", help="Model of the rows to fit, and of rows without one.")
@ALPHA
@init_option("This is the init of the rows to fit, and of rows without one.")
@click.option(
    "--fan-in",
    type=float,
    help="Mean fan-in of the adapted layers, for rows without one.",
)
@click.option(
    "--full-fan-in",
    type=float,
    help="Largest fan-in, for full finetuning. By default --fan-in.",
)
@click.option(
    "--batch",
    type=float,
    help="Batch size of the rows to fit, and of rows without one.",
)
@click.option(
    "--steps",
    type=int,
    help="Training steps of the rows to fit, and of rows without them.",
)
@click.option(
    "--warmup",
    type=float,
    help="Warm-up as a share of the steps, 0 to 1. The recipe records it.",
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
    recipe = fit_sweep(sweep, name=name or sweep.stem, law=law, **options)
    saved = None if out is None else recipe.save(out)
    # a law that is not registered has no document
    echo_result(as_json, recipe, to_document(recipe) if as_json else None)
    if saved is not None and not as_json:
        echo(f"Next: rankaware lr {shlex.quote(str(saved))} {_for_a_rate(recipe)}")


def _for_a_rate(recipe: Recipe) -> str:
    """Return the options with which `rankaware lr` prints a rate of the recipe."""
    rank = max(recipe.ranks, default=None)
    if recipe.scaling_rule == "unknown":
        rank = recipe.reference.rank
    return "--full" if rank is None else f"--rank {rank}"
