"""`rankaware plot`: draw a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from ..recipe import Recipe
from ..reports import plot_recipe
from ._echo import echo
from ._options import out_option


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@out_option(required=True, help="Figure to write, a .png, .svg or .pdf file.")
def plot(recipe: Path, out: Path) -> None:
    """Draw a recipe's trials, and its rates by rank."""
    echo(plot_recipe(Recipe.load(recipe), out))
