"""Options that more than one command takes."""

from __future__ import annotations

from collections.abc import Sequence

import click

__all__ = ["ALPHA", "COLUMN", "OPTIMIZER"]


def _number_or_rank(ctx: click.Context, param: click.Parameter, value: str | None) -> float | str | None:
    if value is None or value == "rank":
        return value
    try:
        return float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor 'rank'.") from error


def _columns(ctx: click.Context, param: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    parted = [pair.partition("=") for pair in pairs]
    if not all(equals for _, equals, _ in parted):
        raise click.BadParameter("Write FIELD=COLUMN, such as loss=final_loss.")
    return {field.strip(): column.strip() for field, _, column in parted}


ALPHA = click.option(
    "--alpha", callback=_number_or_rank, help="For rows that do not say it; 'rank' where it follows the rank."
)
COLUMN = click.option("--column", "columns", multiple=True, callback=_columns, help="FIELD=COLUMN, repeatable.")
OPTIMIZER = click.option("--optimizer", default="AdamW", show_default=True, help="A name, or package:Class.")
