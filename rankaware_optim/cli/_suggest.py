"""`rankaware suggest`: suggest a rate for an adapter's file, or for a rank and an alpha, without
any run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .._types import Reference
from ..inspection import inspect_file, read_config
from ..transfer import published_init, suggest_lr
from ._echo import echo, echo_json
from ._options import RATE_FIELDS, RSLORA, init_option, json_option, may_name_module

_INITS = ("A", "B", "pissa", "olora", "lora_ga")


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--rank", type=int, help="LoRA rank.")
@click.option("--alpha", type=float, help="LoRA alpha.")
@RSLORA
@init_option("Others: as in PEFT's init_lora_weights.", _INITS)
@click.option("--dora", is_flag=True, help="The adapters are DoRA.")
@click.option("--full", is_flag=True, help="Suggest a rate for full finetuning.")
@click.option(
    "--fan-in", type=float, help="Hidden size of the model. With --full its largest fan-in."
)
@click.option(
    "--optimizer",
    callback=may_name_module,
    default="adamw",
    show_default=True,
    help="Optimizer: a name, or package:Class.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Your data is chat, your batch near 128, and you train about 800 steps. Narrows the band.",
)
@json_option(
    f"an object. Fields: {RATE_FIELDS}, optimizer (name), reference (rank, alpha, rslora, init,"
    " fan_in, method and batch), fan_in (width of the model)."
)
def suggest(
    path: Path | None,
    rank: int | None,
    alpha: float | None,
    rslora: bool,
    init: str | None,
    dora: bool,
    full: bool,
    fan_in: float | None,
    optimizer: str,
    chat: bool,
    as_json: bool,
) -> None:
    """Suggest a rate from published sweeps, without any run.

    Give the PATH of an adapter, or --rank and --alpha, or --full. The rate is printed with its 90 %
    band.
    """
    if full and init is not None:
        raise click.UsageError("Full finetuning has no --init.")
    options: dict[str, Any] = {"init": init, "task": "chat" if chat else "other"}
    if path is not None:
        if rank is not None or alpha is not None or rslora or fan_in is not None:
            raise click.UsageError(
                "PATH already gives rank, alpha and fan-in, so leave these options out."
            )
        survey, config = inspect_file(path), path / "adapter_config.json"
        if not init and not full and config.is_file():
            options["init"] = published_init(read_config(config).values.get("init_lora_weights"))
        options |= {"method": "full" if full else "lora", "dora": dora or None}
        found = suggest_lr(survey, optimizer, **options)
        echo_json(found) if as_json else echo(found)
        return
    if full and (rank is not None or alpha is not None or rslora):
        raise click.UsageError("Full finetuning has no --rank, --alpha or --rslora.")
    if not full and (rank is None or alpha is None):
        raise click.UsageError("Give a PATH, or --rank and --alpha, or --full.")
    reference = Reference(rank, alpha, rslora, fan_in=fan_in, method="full" if full else "lora")
    found = suggest_lr(reference, optimizer, dora=dora, **options)
    echo_json(found) if as_json else echo(found)
