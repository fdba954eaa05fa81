"""`rankaware show`: what a recipe holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from ..recipe import Recipe

__all__ = ["show"]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
def show(recipe: Path) -> None:
    """Print what a recipe holds."""
    loaded = Recipe.load(recipe)
    Console(width=None if sys.stdout.isatty() else 100).print(_recipe_table(loaded))


def _recipe_table(recipe: Recipe) -> Any:
    made = Table(title=f"Recipe {recipe.name!r}", title_justify="left", box=box.SIMPLE, show_header=False)
    own = recipe.at() if recipe.reference.method == "lora" else recipe.at(method="full")
    rows = {
        "base rate": f"{recipe.lr:.3g} at {recipe.reference}, width {recipe.reference.fan_in or 'unknown'}",
        "90 % band": f"{own.low:.3g} to {own.high:.3g}",
        "ceiling": "none seen" if recipe.ceiling is None else f"{recipe.ceiling:.3g}",
        "law": repr(recipe.law),
        "alpha by rank": recipe.scaling_rule,
        "optimizer": f"{recipe.optimizer} {dict(recipe.settings)}",
        "horizon": f"{recipe.steps or 'untold'} steps, batch {recipe.batch or 'not told'}, "
        f"warm-up {'not told' if recipe.warmup is None else f'{recipe.warmup:.0%}'}",
        "seen": f"ranks {', '.join(map(str, recipe.ranks)) or 'none'}{', full finetuning' * recipe.full_seen}; "
        f"{len(recipe.tensors.get('lr', ()))} trials",
        **({"notes": "; ".join(recipe.notes)} if recipe.notes else {}),
        "versions": ", ".join(f"{k} {v}" for k, v in recipe.versions.items()),
    }
    for key, value in rows.items():
        made.add_row(key, value)
    return made
