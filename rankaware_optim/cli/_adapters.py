"""The commands about adapters: `rankaware inspect` and `suggest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from .. import inspection, transfer
from .._checks import PUBLISHED_INITS
from .._types import Reference, Task
from ..inspection import Survey
from ._options import (
    FILE,
    INIT_HELP,
    OPTIMIZER,
    RSLORA,
    echo,
    echo_result,
    flag,
    option,
)

_SURVEY = (
    "an object. Fields: factors (one object per LoRA factor), other (names of the other tensors),"
    " unsupported (their adapter's kind, by name), frozen (names), checks (sentences on"
    " likely mistakes), notes (sentences). A factor has name, role (A or B), rank, fan_in and"
    " fan_out (of the adapted layer), scaling (alpha / rank), init, kind, layer, adapter and"
    " convention."
)


@click.command()
@click.argument("path", type=FILE)
@flag("--json as_json", f"Print JSON: {_SURVEY}")
def inspect(path: Path, as_json: bool) -> None:
    """List the LoRA factors in an adapter's files.

    PATH is a PEFT folder or a .safetensors file. The model is not needed.
    """
    survey = inspection.inspect_file(path)
    more = {"unsupported": survey.unsupported, "checks": survey.audit()}
    document = {**vars(survey), **more}
    echo_result(as_json, str(survey), document)


@click.command(options_metavar="--rank 16 --alpha 32 [OPTIONS]")
@click.argument("path", type=FILE, required=False, metavar="[ADAPTER]")
@option("--rank", int, "LoRA rank.")
@option("--alpha", float, "LoRA alpha.")
@RSLORA
@option(
    "--init",
    click.Choice(("A", "B", *PUBLISHED_INITS)),
    f"{INIT_HELP} Others: as in PEFT's init_lora_weights.",
)
@flag("--dora", "The adapters are DoRA.")
@flag("--full", "Suggest a rate for full finetuning.")
@option("--fan-in", float, "Hidden size of the model. With --full its largest fan-in.")
@OPTIMIZER
@option(
    "--task",
    click.Choice(get_args(Task)),
    "chat: your data is chat, your batch near 128, and you train about 800 steps, which narrows the"
    " band. rl: reinforcement learning (GRPO, RLOO), which has lower rates. dpo: direct preference"
    " optimization, known for --full only.",
    default="other",
)
@option("--steps", int, "Optimizer steps of the run. More than 780 lower the rate.")
def suggest(
    path: Path | None,
    full: bool,
    init: Any,
    dora: bool,
    optimizer: str,
    task: Task,
    steps: int | None,
    **shape: Any,
) -> None:
    """Suggest a rate from published sweeps, without any run.

    Give the folder or file of an ADAPTER, or --rank and --alpha, or --full. The rate is printed
    with its 90 % band.
    """
    method: Any = "full" if full else "lora"
    model: Survey | Reference
    if path is None:
        model = Reference(**shape, method=method)
    elif any(shape.values()):
        raise click.UsageError(
            "ADAPTER already gives rank, alpha and fan-in, so leave these options out."
        )
    else:
        model = inspection.inspect_file(path)
        config = path / "adapter_config.json"
        if config.is_file() and not (init or full):
            init = inspection.read_config(config).init_lora_weights
    suggestion = transfer.suggest_lr(
        model,
        optimizer,
        method=method,
        init=init,
        dora=dora or None,
        task=task,
        steps=steps,
    )
    echo(suggestion)
