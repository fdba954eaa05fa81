"""`rankaware diff`: compare two recipes."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import RankAwareError
from ..recipe import Recipe, diff_recipes, diff_text
from ._echo import echo, echo_json
from ._options import json_option


class _Trouble(click.ClickException):
    """An error of the comparison. Its exit code is 2, as for diff(1), since 1 means that the two differ."""

    exit_code = 2


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@json_option("a list of what differs, each with what, first, second and words; [] where nothing does.")
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Print how recipe SECOND differs from FIRST: rates, law, optimizer, horizon, trials. Exit code 0: none."""
    try:
        one, two = Recipe.load(first), Recipe.load(second)
    except RankAwareError as error:
        raise _Trouble(str(error)) from error
    found = diff_recipes(one, two)
    echo_json(found) if as_json else echo(diff_text(found))
    ctx.exit(1 if found else 0)
