"""`rankaware diff`: compare two recipes."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import RankAwareError
from ..recipe import Recipe
from ..reports import diff_recipes, diff_text
from ._echo import echo, echo_json
from ._options import json_option


class _Trouble(click.ClickException):
    """An error of the comparison. Its exit code is 2, as for diff(1), since 1 means that the two
    differ.
    """

    exit_code = 2


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@json_option(
    "a list with one object per difference, [] if there is none. Fields: what (a field of"
    " recipes/SCHEMA.md, or a configuration such as 'at rank 8'), first and second (values as"
    " text), words (the difference in words, or '')."
)
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Print how recipe SECOND differs from recipe FIRST.

    Rates, law, optimizer, steps, batch and trials are compared. The exit code is 0 if the recipes
    are equal, 1 if they differ, and 2 if one of them cannot be read.
    """
    try:
        one, two = Recipe.load(first), Recipe.load(second)
    except RankAwareError as error:
        raise _Trouble(str(error)) from error
    found = diff_recipes(one, two)
    echo_json(found) if as_json else echo(diff_text(found))
    ctx.exit(1 if found else 0)
