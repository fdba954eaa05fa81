"""`rankaware lr`: a recipe's rate at a rank, or for full finetuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..recipe import Recipe
from ._echo import echo, echo_json
from ._options import RATE_FIELDS, RSLORA, init_option, json_option


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="LoRA rank.")
@click.option(
    "--alpha",
    type=float,
    help="LoRA alpha. By default by the recipe's rule, which rankaware show prints.",
)
@RSLORA
@init_option("By default the recipe's.")
@click.option("--full", is_flag=True, help="Print the rate for full finetuning.")
@click.option("--fan-in", type=float, help="Width of the model, if it differs from the recipe's.")
@click.option(
    "--steps", type=int, help="Training steps, if they differ from the recipe's. This extrapolates."
)
@click.option(
    "--batch", type=float, help="Batch size in the recipe's unit, if it differs. This extrapolates."
)
@json_option(f"an object. Fields: {RATE_FIELDS}.")
def lr(
    recipe: Path,
    rank: int | None,
    alpha: float | None,
    rslora: bool,
    full: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Print a recipe's rate at a rank or for full finetuning.

    The 90 % band, the ceiling and what the rate holds for are printed with it.
    """
    if full == (rank is not None):
        raise click.UsageError("Give --rank N or --full.")
    if alpha is None and rslora:
        raise click.UsageError("--rslora needs --alpha.")
    for option, value in (("alpha", alpha), ("init", where["init"])):
        if full and value is not None:
            raise click.UsageError(f"Full finetuning has no --{option}.")
    method: Any = "full" if full else "lora"
    rate = Recipe.load(recipe).at(rank, alpha=alpha, rslora=rslora, method=method, **where)
    echo_json(rate) if as_json else echo(rate)
