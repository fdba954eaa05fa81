"""`rankaware fit`: fit a recipe to a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..recipe import to_document
from ..sweeps import fit_sweep
from ._echo import echo, echo_json
from ._options import ALPHA, COLUMN, OPTIMIZER, json_option, out_option


@click.command()
@click.argument("sweep", type=click.Path(path_type=Path))
@out_option(help="Write the recipe to a .toml file.")
@click.option("--name", help="Name of the recipe; by default the file's.")
@OPTIMIZER
@click.option("--law", default="mua", show_default=True, help="Law, as for bench-law.")
@click.option("--fit", type=click.Choice(["drift", "tokens"]), default="drift", show_default=True)
@click.option("--model", help="The model to fit, if the sweep has several.")
@ALPHA
@click.option("--init", type=click.Choice(["A", "B"]))
@click.option("--fan-in", type=float, help="The model's mean fan-in.")
@click.option("--full-fan-in", type=float, help="Its largest fan-in, for full finetuning.")
@click.option("--batch", type=float)
@click.option("--steps", type=int)
@click.option("--warmup", type=float, help="Share of the steps.")
@COLUMN
@json_option("the sections of the recipe's file, as recipes/SCHEMA.md names them.")
def fit(sweep: Path, out: Path | None, name: str | None, law: str, as_json: bool, **options: Any) -> None:
    """Fit a recipe to SWEEP, a .csv, .tsv, .json or .jsonl file with columns rank, lr, loss and, if known, alpha."""
    recipe = fit_sweep(sweep, name=name or sweep.stem, law=law, **options)
    saved = None if out is None else recipe.save(out)
    if as_json:
        echo_json(to_document(recipe))
        return
    echo(recipe)
    if saved is not None:
        echo(f"Next: rankaware lr {saved} --rank {max(recipe.ranks, default=16)}")
