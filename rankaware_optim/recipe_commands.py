"""The commands on recipes that have a room of their own: `rankaware plot`, `report` and `diff`."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import RankAwareError
from .recipe import Recipe

__all__ = ["diff", "plot", "report"]

_RECIPE = click.Path(path_type=Path)


@click.command()
@click.argument("recipe", type=_RECIPE)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def plot(recipe: Path, out: Path) -> None:
    """Draw a recipe: its trials, and its rates by rank."""
    from .plots import plot_recipe

    click.echo(plot_recipe(Recipe.load(recipe), out))


@click.command()
@click.argument("recipe", type=_RECIPE)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def report(recipe: Path, out: Path) -> None:
    """Write a recipe as one page to open in a browser: its picture, its rates, and a control for rank and alpha."""
    from .report_page import write_report

    click.echo(write_report(Recipe.load(recipe), out))


class _Trouble(click.ClickException):
    """What stops a comparison ends with 2, as for diff(1): 1 says that the two differ."""

    exit_code = 2


@click.command()
@click.argument("first", type=_RECIPE)
@click.argument("second", type=_RECIPE)
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path) -> None:
    """Say how recipe SECOND differs from FIRST: rates, law, optimizer, horizon, trials. Exit code 0: not at all."""
    from .recipe_diff import diff_recipes, diff_text

    try:
        one, two = Recipe.load(first), Recipe.load(second)
    except RankAwareError as error:
        raise _Trouble(str(error)) from error
    found = diff_recipes(one, two)
    click.echo(diff_text(found))
    ctx.exit(1 if found else 0)
