"""`rankaware plot`: a recipe as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from ..recipe import Recipe, plot_recipe


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def plot(recipe: Path, out: Path) -> None:
    """Draw a recipe: its trials, and its rates by rank."""
    click.echo(plot_recipe(Recipe.load(recipe), out))
