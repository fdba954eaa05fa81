"""`rankaware convert`: a rate at another rank, alpha, init or method."""

from __future__ import annotations

import click

from .._types import Reference
from ..inspection import as_reference, read_training, reference_of
from ..laws import DEFAULT_LAW, Law, bound_law, get_law
from ..transfer import convert_lr
from ._configurations import TOOLS, Change, configuration
from ._echo import echo


@click.command()
@click.argument("lr", type=float, required=False)
@click.option("--from", "from_", required=True, help="Where LR was tuned: r=16,alpha=32, full,fan_in=4096, an adapter.")
@click.option("--to", required=True, help="Where it is wanted, as r=128,alpha=16,rslora; alone r=64 keeps the alpha.")
@click.option("--law", default=DEFAULT_LAW, show_default=True)
@click.option("--as", "tool", type=click.Choice(list(TOOLS)), help="Print a trainer's configuration, ready to paste.")
def convert(lr: float | None, from_: str, to: str, law: str, tool: str | None) -> None:
    """Say in words what LR, tuned with one rank and alpha, becomes with another.

    Without LR it is what kohya's scripts wrote into the adapter that --from names, for each part that has its own.
    """
    if lr is not None:
        echo(_said(lr, as_reference(from_), to, get_law(law), law, tool))
        return
    made, bound = read_training(from_), get_law(law)
    if made.optimizer:
        bound = bound_law(bound, made.optimizer_class, made.settings or {})
    by = f" by {made.optimizer}" if made.optimizer else ""
    during = f" over {made.steps} steps" if made.steps else ""
    for part, rate, survey in made.rates:
        at, comment = reference_of(survey), "# " if tool else ""
        echo(f"{comment}{part or 'The adapter'} was trained at {rate:g}, {at}{by}{during}.")
        echo(_said(rate, at, to, bound, law, tool))


def _said(lr: float, origin: Reference, to: str, bound: Law, law: str, tool: str | None) -> str:
    """A conversion in words, or as a trainer's configuration, which names the law as it was given."""
    converted = convert_lr(lr, from_=origin, to=to, law=bound)
    if tool is None:
        return converted.explain()
    return configuration(tool, Change(lr, origin, as_reference(to, like=origin), law, converted))
