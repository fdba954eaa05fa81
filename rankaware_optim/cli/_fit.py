"""`rankaware fit`: a sweep made into a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..laws import law_words
from ..sweeps import fit_sweep
from ._echo import echo
from ._options import ALPHA, COLUMN, OPTIMIZER, out_option


@click.command()
@click.argument("sweep", type=click.Path(path_type=Path))
@out_option(help="Write the recipe, a .toml file.")
@click.option("--name", help="The recipe's name; by default the file's.")
@OPTIMIZER
@click.option("--law", default="mua", show_default=True, help="As for bench-law.")
@click.option("--fit", type=click.Choice(["drift", "tokens"]), default="drift", show_default=True)
@click.option("--model", help="The model to fit, where the sweep holds several.")
@ALPHA
@click.option("--init", type=click.Choice(["A", "B"]))
@click.option("--fan-in", type=float, help="The model's mean fan-in.")
@click.option("--full-fan-in", type=float, help="Its largest fan-in, for full finetuning.")
@click.option("--batch", type=float)
@click.option("--steps", type=int)
@click.option("--warmup", type=float, help="Share of the steps.")
@COLUMN
def fit(sweep: Path, out: Path | None, name: str | None, law: str, **options: Any) -> None:
    """Make a recipe of SWEEP, a .csv, .tsv, .json or .jsonl file with columns rank, lr, loss and, if known, alpha."""
    recipe = fit_sweep(sweep, name=name or sweep.stem, law=law, **options)
    number, at, *rest = str(recipe.at(method=recipe.reference.method)).splitlines()
    echo("\n".join([number, at, f"law       {law_words(recipe.law)}", *rest]))
    if out is not None:
        echo(f"Next: rankaware lr {recipe.save(out)} --rank {max(recipe.ranks, default=16)}")
