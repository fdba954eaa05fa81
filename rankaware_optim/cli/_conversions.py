"""`rankaware convert`: convert a rate to another rank, alpha, init or method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import click

from .._types import Reference
from ..inspection import as_reference, read_training, reference_of
from ..laws import DEFAULT_LAW, Law, bound_law, get_law
from ..transfer import convert_lr
from ._configurations import TOOLS, Change, as_words, configuration
from ._echo import echo_result
from ._options import json_option, law_option

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
_TO = (
    "New configuration, such as r=128,alpha=16,rslora or full. r=64 alone keeps alpha."
)


@dataclass(frozen=True)
class _Tuned:
    """A rate to convert. part: of the adapter, None if the user gave the rate. training: how it
    was trained, in words.
    """

    lr: float
    reference: Reference
    part: str | None = None
    training: str = ""


@click.command()
@click.argument("lr", type=float, required=False)
@click.option("--from", "from_", required=True, help=_FROM)
@click.option("--to", required=True, help=_TO)
@law_option("Law that moves the rate.", default=DEFAULT_LAW)
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
    bound: Law = get_law(law)
    if lr is None:
        bound, rates = _trained(from_, bound)
    else:
        rates = [_Tuned(lr, as_reference(from_))]
    documents, texts = [], []
    for tuned in rates:
        at = tuned.reference
        conversion = convert_lr(tuned.lr, from_=at, to=to, law=bound)
        change = Change(tuned.lr, at, as_reference(to, like=at), law, conversion)
        documents.append(_document(tuned.part, change))
        texts += [f"{'# ' if tool else ''}{tuned.training}"] if tuned.training else []
        texts.append(configuration(tool, change) if tool else conversion.explain())
    echo_result(as_json, "\n".join(texts), documents)


def _trained(path: str, law: Law) -> tuple[Law, list[_Tuned]]:
    """Return the law bound to the adapter's optimizer, and the rates of the adapter's parts."""
    training = read_training(path)
    if training.optimizer:
        law = bound_law(law, training.optimizer_class, training.settings)
    by = f" by {training.optimizer}" if training.optimizer else ""
    during = f" over {training.steps} steps" if training.steps else ""
    rates = []
    for part, lr, survey in training.rates:
        at = reference_of(survey)
        words = f"{part or 'The adapter'} was trained at {lr:g}, {at}{by}{during}."
        rates.append(_Tuned(lr, at, part or None, words))
    return law, rates


def _document(part: str | None, change: Change) -> dict[str, Any]:
    places = {"from": as_words(change.origin), "to": as_words(change.target)}
    return {"part": part, "from_lr": change.lr, **places, **asdict(change.converted)}
