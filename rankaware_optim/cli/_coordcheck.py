"""`rankaware coordcheck`: check whether a law's rates move features equally far at every rank,
before any training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .._types import Reference
from ..errors import LawError
from ..inspection import inspect_file
from ..transfer import coordinate_check, plot_coordinates
from ._options import (
    FILE,
    LAW_TEXT,
    OPTIMIZER,
    RANK_OR_NUMBER,
    RSLORA,
    Several,
    echo,
    flag,
    init_option,
    law_option,
    option,
    out_option,
)

_Shape = tuple[int, int]
# of a layer's inputs, gradients and factors: 1 GiB, without the optimizer's state
_MOST_NUMBERS = 2**28


def _shape(text: str) -> _Shape:
    match = re.fullmatch(r"\s*([1-9]\d{0,8})\s*[xX×]\s*([1-9]\d{0,8})\s*", text)
    if match is None:
        raise click.BadParameter(
            f"{text!r} is not a shape: write N_OUTxN_IN, such as 4096x14336."
        )
    return int(match[1]), int(match[2])


@click.command()
@click.argument("path", type=FILE, required=False)
@option(
    "--shape shapes",
    _shape,
    "Layer. Repeatable. By default 1024x1024.",
    multiple=True,
    metavar="N_OUTXN_IN",
)
@option("--ranks", Several(click.INT), "LoRA ranks to compare.", default="4,16,64")
@OPTIMIZER
@law_option(f"Law to check. {LAW_TEXT} By default mua with as many tokens as --tokens.")
@option(
    "--lr",
    float,
    "A's rate at the first rank, per step. By default it moves the output by an rms of 1.",
)
@init_option(default="A")
@option(
    "--alpha",
    RANK_OR_NUMBER,
    "alpha: a number, or 'rank' for alpha = rank.",
    default="rank",
)
@RSLORA
@option("--tokens", int, "Number of synthetic tokens.", default=512)
@option("--steps", int, "Number of optimizer steps.", default=4)
@out_option("Draw the result to a .png, .svg or .pdf file.")
@flag("--strict", "Exit with code 1 if features do not move equally far at every rank.")
@click.pass_context
def coordcheck(
    ctx: click.Context,
    /,
    path: Path | None,
    shapes: tuple[_Shape, ...],
    alpha: Any,
    rslora: bool,
    out: Path | None,
    strict: bool,
    **options: Any,
) -> None:
    """Check whether features move equally far at every rank.

    They do if the law's rates are right. The check takes a few steps of the real optimizer on
    synthetic data. The layers are those of the adapter at PATH, or those given by --shape.
    """
    if path is not None and shapes:
        raise click.UsageError("PATH already gives the shapes, so leave --shape out.")
    if rslora and alpha == "rank":
        raise click.UsageError("--rslora needs a numeric --alpha.")
    if path is None:
        layers = {
            f"{n_out}x{n_in}": (n_out, n_in)
            for n_out, n_in in shapes or ((1024, 1024),)
        }
    else:
        layers = _adapted(path)
    _refuse_huge(layers, max(options["ranks"]), options["tokens"])

    def scaling(rank: int) -> float:
        return Reference(rank, rank if alpha == "rank" else alpha, rslora).scaling

    check = coordinate_check(layers, scaling=scaling, **options)
    echo(check)
    if out is not None:
        echo(f"Figure: {plot_coordinates(check, out)}")
    ctx.exit(int(strict and not check.ok))


def _adapted(path: Path) -> dict[str, _Shape]:
    """Return (n_out, n_in) of every layer of an adapter on disk, without embeddings."""
    factors = [
        f for f in inspect_file(path).factors if f.role == "A" and f.kind != "embedding"
    ]
    if not factors:
        raise LawError(
            f"{path} has no layer that can be checked.",
            "Give a LoRA adapter, or --shape.",
        )
    return {f.layer: (int(f.fan_out), int(f.fan_in)) for f in factors}


def _refuse_huge(layers: Mapping[str, _Shape], rank: int, tokens: int) -> None:
    name, fans = max(layers.items(), key=lambda item: sum(item[1]))
    if (count := sum(fans) * (tokens + rank)) > _MOST_NUMBERS:
        raise LawError(
            f"The layer {name} with {tokens} tokens at rank {rank} needs {count / 2**28:.3g} GiB"
            " before any step.",
            "Give fewer tokens, smaller ranks or a smaller shape.",
        )
