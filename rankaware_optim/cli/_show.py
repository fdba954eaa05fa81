"""`rankaware show`: print a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from ..recipe import Recipe, to_document
from ._echo import echo, echo_json
from ._options import RECIPE_FIELDS, json_option


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@json_option(RECIPE_FIELDS)
def show(recipe: Path, as_json: bool) -> None:
    """Print a recipe: its rate, band, law and provenance."""
    found = Recipe.load(recipe)
    echo_json(to_document(found)) if as_json else echo(found)
