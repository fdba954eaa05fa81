"""The command `rankaware coordcheck`: whether a law's rates move features alike at every rank, before any training."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .._types import Reference
from ..errors import LawError
from ..inspection import inspect_file
from ..transfer import CoordinateCheck, coordinate_check, plot_coordinates

__all__ = ["coordcheck"]

Shape = tuple[int, int]
_MOST_NUMBERS = 2**28  # a layer's inputs, gradients and factors: 1 GiB; the optimizer's state comes on top


def _shapes(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> tuple[Shape, ...]:
    matches = [re.fullmatch(r"\s*([1-9]\d{0,8})\s*[xX×]\s*([1-9]\d{0,8})\s*", text) for text in texts]
    for text, match in zip(texts, matches, strict=True):
        if match is None:
            raise click.BadParameter(f"{text!r} is no shape: write N_OUTxN_IN, such as 4096x14336.")
    return tuple((int(match[1]), int(match[2])) for match in matches if match)


def _ranks(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    return tuple(click.INT(part, param, ctx) for part in text.split(","))


def _alpha(ctx: click.Context, param: click.Parameter, text: str) -> float | None:
    """None where alpha follows the rank."""
    return None if text == "rank" else click.FLOAT(text, param, ctx)


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--shape", "shapes", multiple=True, callback=_shapes, help="N_OUTxN_IN, repeatable; else 1024x1024.")
@click.option("--ranks", default="4,16,64", show_default=True, callback=_ranks)
@click.option("--optimizer", default="adamw", show_default=True, help="A name, or package:Class.")
@click.option("--law", help="As for bench-law, such as 'mua?tokens=8'; else mua at the check's own tokens.")
@click.option("--lr", type=float, help="A's rate at the first rank; else the one that moves the output by 1.")
@click.option("--init", type=click.Choice(["A", "B"]), default="A", show_default=True, help="A: B starts at zero.")
@click.option("--alpha", default="rank", show_default=True, callback=_alpha, help="A number, or 'rank': it follows it.")
@click.option("--rslora", is_flag=True, help="alpha is divided by √rank.")
@click.option("--tokens", type=int, default=512, show_default=True)
@click.option("--steps", type=int, default=4, show_default=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw it: a .png, .svg or .pdf.")
@click.option("--strict", is_flag=True, help="Exit with 1 where feature updates are not rank-invariant.")
def coordcheck(
    path: Path | None,
    shapes: tuple[Shape, ...],
    alpha: float | None,
    rslora: bool,
    out: Path | None,
    strict: bool,
    **options: Any,
) -> None:
    """Check whether features move alike at every rank: a few steps of the real optimizer on synthetic data.

    The layers are those that the adapter at PATH adapts, or given by --shape.
    """
    if path is not None and shapes:
        raise click.UsageError("PATH says the shapes by itself: leave --shape out.")
    if rslora and alpha is None:
        raise click.UsageError("--rslora says how --alpha is meant: give --alpha a number too.")
    layers = _adapted(path) if path is not None else {f"{o}x{i}": (o, i) for o, i in shapes or ((1024, 1024),)}
    check = _check(layers, scaling=_scaling(alpha, rslora), **options)
    click.echo(str(check))
    if out is not None:
        click.echo(f"Figure: {plot_coordinates(check, out)}")
    if strict and not check.ok:
        click.get_current_context().exit(1)


def _adapted(path: Path) -> dict[str, Shape]:
    """(n_out, n_in) of every layer that an adapter's file adapts; embeddings are left out."""
    factors = [f for f in inspect_file(path).factors if f.role == "A" and f.kind != "embedding"]
    if not factors:
        raise LawError(f"{path} adapts no layer that can be checked.", "Give a LoRA adapter, or --shape.")
    return {f.layer: (int(f.fan_out), int(f.fan_in)) for f in factors}


def _scaling(alpha: float | None, rslora: bool) -> Callable[[int], float]:
    return lambda rank: Reference(rank, rank if alpha is None else alpha, rslora).scaling


def _check(
    layers: Mapping[str, Shape], ranks: Sequence[int], tokens: int, law: str | None, **options: Any
) -> CoordinateCheck:
    _refuse_huge(layers, max(ranks), tokens)
    sys.path.insert(0, "")  # a law or optimizer of one's own lies in the folder one stands in, as under python -m
    try:
        return coordinate_check(layers, ranks=ranks, tokens=tokens, law=law, **options)
    finally:
        sys.path.remove("")


def _refuse_huge(layers: Mapping[str, Shape], rank: int, tokens: int) -> None:
    name, fans = max(layers.items(), key=lambda item: sum(item[1]))
    if (numbers := sum(fans) * (tokens + rank)) > _MOST_NUMBERS:
        raise LawError(
            f"The layer {name} with {tokens} tokens at rank {rank} takes {numbers / 2**28:.3g} GiB before any step.",
            "Give fewer tokens, smaller ranks or a smaller shape.",
        )
