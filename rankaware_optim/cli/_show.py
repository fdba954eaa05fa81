"""`rankaware show`: what a recipe holds."""

from __future__ import annotations

from pathlib import Path

import click

from ..recipe import Recipe
from ._echo import echo


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
def show(recipe: Path) -> None:
    """Print what a recipe holds."""
    echo(Recipe.load(recipe))
