"""`rankaware lr`: a recipe's rate at a rank, or for full finetuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..recipe import Recipe
from ._echo import echo, echo_json
from ._options import json_option


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--rank", type=int)
@click.option("--alpha", type=float)
@click.option("--rslora", is_flag=True, help="Divide alpha by √rank.")
@click.option("--init", type=click.Choice(["A", "B"]))
@click.option("--full", is_flag=True, help="The rate for full finetuning.")
@click.option("--fan-in", type=float, help="The model's width, if not the recipe's.")
@click.option("--steps", type=int, help="Training steps, if not the recipe's: an extrapolation.")
@click.option("--batch", type=float, help="Batch, in the unit of the recipe's own: an extrapolation.")
@json_option("lr, low and high of the 90 % band, ceiling or null, extrapolated, notes, configuration.")
def lr(
    recipe: Path, rank: int | None, alpha: float | None, rslora: bool, full: bool, as_json: bool, **where: Any
) -> None:
    """Print a recipe's rate at a rank, or for full finetuning, and its configuration."""
    if full == (rank is not None):
        raise click.UsageError("Give --rank N or --full.")
    if alpha is None and rslora:
        raise click.UsageError("--rslora needs --alpha.")
    if full and alpha is not None:
        raise click.UsageError("Full finetuning has no --alpha.")
    method: Any = "full" if full else "lora"
    rate = Recipe.load(recipe).at(rank, alpha=alpha, rslora=rslora, method=method, **where)
    echo_json(rate) if as_json else echo(rate)
