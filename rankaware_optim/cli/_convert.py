"""`rankaware convert`: a rate at another rank, alpha, init or method."""

from __future__ import annotations

import click

from ..inspection import read_training, reference_of
from ..laws import DEFAULT_LAW, bound_law, get_law
from ..transfer import convert_lr
from ._echo import echo


@click.command()
@click.argument("lr", type=float, required=False)
@click.option("--from", "from_", required=True, help="Where LR was tuned: r=16,alpha=32, full,fan_in=4096, an adapter.")
@click.option("--to", required=True, help="Where it is wanted, as r=128,alpha=16,rslora; alone r=64 keeps the alpha.")
@click.option("--law", default=DEFAULT_LAW, show_default=True)
def convert(lr: float | None, from_: str, to: str, law: str) -> None:
    """Say in words what LR, tuned with one rank and alpha, becomes with another.

    Without LR it is what kohya's scripts wrote into the adapter that --from names, for each part that has its own.
    """
    if lr is not None:
        echo(convert_lr(lr, from_=from_, to=to, law=law).explain())
        return
    made, bound = read_training(from_), get_law(law)
    if made.optimizer:
        bound = bound_law(bound, made.optimizer_class, made.settings or {})
    by = f" by {made.optimizer}" if made.optimizer else ""
    during = f" over {made.steps} steps" if made.steps else ""
    for part, rate, survey in made.rates:
        at = reference_of(survey)
        echo(f"{part or 'The adapter'} was trained at {rate:g}, {at}{by}{during}.")
        echo(convert_lr(rate, from_=at, to=to, law=bound).explain())
