"""`rankaware suggest`: a rate for an adapter's file, or for a rank and an alpha, without any run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .._types import Reference
from ..inspection import inspect_file, read_config
from ..transfer import published_init, suggest_lr
from ._echo import echo, echo_json
from ._options import json_option

_INITS = ("A", "B", "pissa", "olora", "lora_ga")


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--rank", type=int)
@click.option("--alpha", type=float)
@click.option("--rslora", is_flag=True, help="Divide alpha by √rank.")
@click.option("--init", type=click.Choice(_INITS), help="A: B starts at zero. B: A does. Or PEFT's init_lora_weights.")
@click.option("--dora", is_flag=True, help="The adapters are DoRA.")
@click.option("--full", is_flag=True, help="The rate for full finetuning.")
@click.option("--fan-in", type=float, help="The model's hidden size; with --full its largest fan-in.")
@click.option("--optimizer", default="adamw", show_default=True, help="A name, or package:Class.")
@click.option("--chat", is_flag=True, help="Chat data, a batch near 128 and about 800 steps: a narrower band.")
@json_option("lr, low, high, ceiling, extrapolated, notes, configuration, optimizer, reference, fan_in.")
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
    """Suggest a learning rate and its band from published sweeps: for an adapter's PATH, or for --rank and --alpha."""
    options: dict[str, Any] = {"init": init, "task": "chat" if chat else "other"}
    if path is not None:
        if rank is not None or alpha is not None or rslora or fan_in is not None:
            raise click.UsageError("PATH already gives rank, alpha and fan-in: leave these options out.")
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
