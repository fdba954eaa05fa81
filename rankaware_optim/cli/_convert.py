"""`rankaware convert`: a rate at another rank, alpha, init or method."""

from __future__ import annotations

import click

from ..laws import DEFAULT_LAW
from ..transfer import convert_lr, parse_reference
from ._configurations import TOOLS, Change, configuration
from ._echo import echo


@click.command()
@click.argument("lr", type=float)
@click.option("--from", "from_", required=True, help="Where LR was tuned, as r=16,alpha=32 or full,fan_in=4096.")
@click.option("--to", required=True, help="Where it is wanted, as r=128,alpha=16,rslora.")
@click.option("--law", default=DEFAULT_LAW, show_default=True)
@click.option("--as", "tool", type=click.Choice(list(TOOLS)), help="Print a trainer's configuration, ready to paste.")
def convert(lr: float, from_: str, to: str, law: str, tool: str | None) -> None:
    """Say in words what LR, tuned with one rank and alpha, becomes with another."""
    converted = convert_lr(lr, from_=from_, to=to, law=law)
    if tool is None:
        echo(converted.explain())
        return
    echo(configuration(tool, Change(lr, parse_reference(from_), parse_reference(to), law, converted)))
