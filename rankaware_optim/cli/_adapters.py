"""The commands about adapters that train nothing: `rankaware inspect`, `suggest` and
`coordcheck`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import inspection, transfer
from .._types import Reference, Survey
from ..errors import LawError
from ..laws import DEFAULT_LAW
from ._options import (
    FILE,
    LAW_TEXT,
    OPTIMIZER,
    RANK_OR_NUMBER,
    RATE_FIELDS,
    RSLORA,
    Several,
    chosen,
    echo,
    echo_result,
    flag,
    init_option,
    json_option,
    law_option,
    optimizer_option,
    option,
    out_option,
    refuse_for_full,
)

_SURVEY = (
    "an object. Fields: factors (one object per LoRA factor), others (name and adapter kind of the"
    " other tensors), checks (sentences on likely mistakes), notes (sentences). A factor has name,"
    " role (A or B), rank, fan_in and fan_out (of the adapted layer), scaling (alpha"
    " / rank), init, kind, layer, adapter, convention, lr (per step) and reason (of lr). lr and"
    " reason are null without --lr."
)


@click.command()
@click.argument("path", type=FILE)
@option("--lr", float, "Base rate, per step. Adds a column of rates.")
@law_option("Law that moves --lr.", DEFAULT_LAW)
@option(
    "--tuned-at",
    str,
    "Configuration at which --lr was tuned: r=16,alpha=32,init=B, or an adapter's path.",
)
@init_option("By default as the files declare it.")
@flag("--per-module", "Print one line per tensor.")
@json_option(_SURVEY)
def inspect(
    path: Path,
    lr: float | None,
    law: str,
    tuned_at: str | None,
    init: Any,
    per_module: bool,
    as_json: bool,
) -> None:
    """List the LoRA factors in an adapter's files.

    PATH is a PEFT folder or a .safetensors file. The model is not needed.
    """
    if lr is None and (tuned_at is not None or law != DEFAULT_LAW):
        raise click.UsageError("--tuned-at and --law move a rate, so give --lr too.")
    survey, rates = transfer.survey_rates(
        inspection.inspect_file(path, init=init), lr=lr, law=law, tuned_at=tuned_at
    )
    factors = []
    for factor in survey.factors:
        rate = rates.get(factor.name)
        rated = {"lr": None, "reason": None} if rate is None else rate._asdict()
        factors.append({**asdict(factor), **rated})
    others = [
        {"name": name, "kind": survey.unsupported.get(name)} for name in survey.other
    ]
    document = {
        "factors": factors,
        "others": others,
        "checks": survey.audit(),
        "notes": survey.notes,
    }
    text = survey.explain(per_module=per_module, rates=rates)
    echo_result(as_json, text, document)


@click.command()
@click.argument("path", type=FILE, required=False)
@option("--rank", int, "LoRA rank.")
@option("--alpha", float, "LoRA alpha.")
@RSLORA
@init_option(
    "Others: as in PEFT's init_lora_weights.",
    ("A", "B", "pissa", "olora", "lora_ga"),
)
@flag("--dora", "The adapters are DoRA.")
@flag("--full", "Suggest a rate for full finetuning.")
@option("--fan-in", float, "Hidden size of the model. With --full its largest fan-in.")
@optimizer_option("adamw")
@flag(
    "--chat",
    "Your data is chat, your batch near 128, and you train about 800 steps. Narrows the band.",
)
@json_option(
    f"an object. Fields: {RATE_FIELDS}, optimizer (name), reference (rank, alpha, rslora, init,"
    " fan_in, method and batch), fan_in (width of the model)."
)
def suggest(
    path: Path | None,
    full: bool,
    init: str | None,
    dora: bool,
    optimizer: str,
    chat: bool,
    as_json: bool,
    **shape: Any,
) -> None:
    """Suggest a rate from published sweeps, without any run.

    Give the PATH of an adapter, or --rank and --alpha, or --full. The rate is printed with its 90 %
    band.
    """
    method: Any = "lora"
    if full:
        method = "full"
        refuse_for_full(
            init=init, rank=shape["rank"], alpha=shape["alpha"], rslora=shape["rslora"]
        )
    model: Survey | Reference
    if path is None:
        if not full and None in (shape["rank"], shape["alpha"]):
            raise click.UsageError("Give a PATH, or --rank and --alpha, or --full.")
        model = Reference(**shape, method=method)
    else:
        if chosen(shape):
            raise click.UsageError(
                "PATH already gives rank, alpha and fan-in, so leave these options out."
            )
        model = inspection.inspect_file(path)
        init = init if init or full else _declared_init(path)
    suggestion = transfer.suggest_lr(
        model,
        optimizer,
        method=method,
        init=init,
        dora=dora or None,
        task="chat" if chat else "other",
    )
    echo_result(as_json, suggestion)


def _declared_init(path: Path) -> str | None:
    """Return the init that an adapter's configuration declares, if its rate is published."""
    config = path / "adapter_config.json"
    if not config.is_file():
        return None
    return transfer.published_init(
        inspection.read_config(config).values.get("init_lora_weights")
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

    check = transfer.coordinate_check(layers, scaling=scaling, **options)
    echo(check)
    if out is not None:
        echo(f"Figure: {transfer.plot_coordinates(check, out)}")
    ctx.exit(int(strict and not check.ok))


def _adapted(path: Path) -> dict[str, _Shape]:
    """Return (n_out, n_in) of every layer of an adapter on disk, without embeddings."""
    factors = [
        f
        for f in inspection.inspect_file(path).factors
        if f.role == "A" and f.kind != "embedding"
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
