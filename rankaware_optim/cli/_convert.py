"""`rankaware convert`: convert a rate to another rank, alpha, init or method."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from .._types import Reference
from ..inspection import as_reference, read_training, reference_of
from ..laws import DEFAULT_LAW, Law, bound_law, get_law
from ..transfer import convert_lr
from ._configurations import TOOLS, Change, as_words, configuration
from ._echo import echo, echo_json
from ._options import json_option, may_name_module

_SHAPE = (
    "a list with one object per rate. Fields: part (of the adapter; null if LR is given), from_lr"
    " (per step), from and to (as for --from and --to), lr (one rate for both factors), lr_a and"
    " lr_b (a rate for each), eps_scale_a, eps_scale_b, weight_decay_scale_a and"
    " weight_decay_scale_b (factors, for use with lr_a and lr_b), a_scale (factor of another exact"
    " form), exact (whether lr_a and lr_b undo the change), notes (sentences). low is 0, high and"
    " ceiling are null, extrapolated is false and configuration is empty."
)

_FROM = (
    "Configuration at which LR was tuned: r=16,alpha=32, or full,fan_in=4096, or the path of an"
    " adapter."
)
_TO = "New configuration, such as r=128,alpha=16,rslora or full. r=64 alone keeps alpha."

_Part = tuple[str | None, str, float, Reference]  # name, training as text, rate, configuration


@click.command()
@click.argument("lr", type=float, required=False)
@click.option("--from", "from_", required=True, help=_FROM)
@click.option("--to", required=True, help=_TO)
@click.option(
    "--law",
    callback=may_name_module,
    default=DEFAULT_LAW,
    show_default=True,
    help="Law that moves the rate.",
)
@click.option(
    "--as",
    "tool",
    type=click.Choice(list(TOOLS)),
    help="Print a trainer's configuration, ready to paste.",
)
@json_option(_SHAPE)
def convert(
    lr: float | None, from_: str, to: str, law: str, tool: str | None, as_json: bool
) -> None:
    """Convert a tuned rate to another rank, alpha, init or method.

    LR is the learning rate that was tuned at --from. Without LR, the rates that kohya's scripts
    wrote into the adapter --from are converted, one for each part, such as the UNet.
    """
    if tool and as_json:
        raise click.UsageError(
            "--as prints a trainer's configuration and --json the numbers. Give one of them."
        )
    if lr is not None:
        bound: Law = get_law(law)
        parts: list[_Part] = [(None, "", lr, as_reference(from_))]
    else:
        bound, parts = _trained(from_, get_law(law))
    changes = [
        (
            part,
            words,
            Change(
                rate,
                at,
                as_reference(to, like=at),
                law,
                convert_lr(rate, from_=at, to=to, law=bound),
            ),
        )
        for part, words, rate, at in parts
    ]
    if as_json:
        echo_json([_document(part, change) for part, _, change in changes])
        return
    for _, words, change in changes:
        if words:
            echo(f"{'# ' if tool else ''}{words}")
        echo(configuration(tool, change) if tool else change.converted.explain())


def _trained(path: str, law: Law) -> tuple[Law, list[_Part]]:
    """Return the law bound to the adapter's optimizer, and the adapter's parts."""
    made = read_training(path)
    if made.optimizer:
        law = bound_law(law, made.optimizer_class, made.settings or {})
    by = f" by {made.optimizer}" if made.optimizer else ""
    during = f" over {made.steps} steps" if made.steps else ""
    parts: list[_Part] = []
    for part, rate, survey in made.rates:
        at = reference_of(survey)
        words = f"{part or 'The adapter'} was trained at {rate:g}, {at}{by}{during}."
        parts.append((part or None, words, rate, at))
    return law, parts


def _document(part: str | None, change: Change) -> dict[str, Any]:
    places = {"from": as_words(change.origin), "to": as_words(change.target)}
    return {"part": part, "from_lr": change.lr, **places, **asdict(change.converted)}
