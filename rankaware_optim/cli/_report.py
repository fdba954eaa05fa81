"""`rankaware report`: write a recipe as an HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from ..recipe import Recipe
from ..reports import write_report
from ._echo import echo
from ._options import out_option


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@out_option("page", required=True, help="HTML page to write.")
def report(recipe: Path, out: Path) -> None:
    """Write a recipe as an HTML page.

    The page has the recipe's figure, its rates, and a control for rank and alpha.
    """
    echo(write_report(Recipe.load(recipe), out))
