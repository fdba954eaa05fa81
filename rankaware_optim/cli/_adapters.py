"""This module defines the commands `rankaware inspect` and `rankaware suggest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from .. import inspection, recipe, transfer
from .._checks import PUBLISHED_INITS, check_lr
from .._types import Reference, Task
from ..inspection import Survey
from ._options import (
    FILE,
    INIT_HELP,
    MODEL_CONFIG,
    OPTIMIZER,
    RSLORA,
    echo,
    echo_result,
    flag,
    option,
    widths_note,
)

_SURVEY = (
    "an object. Fields: factors (one object for each LoRA matrix), other (names of the other"
    " tensors), unsupported (the kind of adapter they belong to, by name), frozen (names), checks"
    " (sentences on likely mistakes), notes (sentences). A factor has name, role (A or B), rank,"
    " fan_in and fan_out (of the adapted layer), scaling (alpha / rank), init, kind, layer, adapter"
    " and convention."
)


@click.command()
@click.argument("path", type=FILE)
@flag("--json as_json", f"Print JSON: {_SURVEY}")
def inspect(path: Path, as_json: bool) -> None:
    """List the LoRA matrices in the files of an adapter.

    PATH is a folder that PEFT saved, or a .safetensors file. The model is not needed.
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
    f"{INIT_HELP} The others are values of PEFT's init_lora_weights.",
)
@flag("--dora", "The adapters are DoRA.")
@flag("--full", "Suggest a learning rate for full finetuning.")
@option("--hidden-size", float, "Hidden size of the model, for LoRA.")
@option("--fan-in", float, "Largest fan-in of the model's layers, for --full.")
@MODEL_CONFIG
@OPTIMIZER
@option(
    "--task",
    click.Choice(get_args(Task)),
    "chat: your data is chat, your batch is near 128 and you train about 800 steps, as in the"
    " published sweeps, so the interval is narrower. rl: reinforcement learning (GRPO, RLOO), which"
    " needs lower learning rates. dpo: direct preference optimization, known for --full only.",
    default="other",
)
@option(
    "--steps", int, "Optimizer steps of the run. More than 780 lower the learning rate."
)
@option(
    "--judge",
    float,
    "Compare this learning rate with the suggestion, such as the one you use.",
)
def suggest(
    path: Path | None,
    full: bool,
    init: Any,
    dora: bool,
    optimizer: str,
    task: Task,
    steps: int | None,
    hidden_size: float | None,
    model_config: Path | None,
    judge: float | None,
    **shape: Any,
) -> None:
    """Suggest a learning rate from published sweeps, without any training run.

    Name the folder or file of an ADAPTER, or pass --rank and --alpha, or --full. The learning rate
    is printed with its 90 % interval.
    """
    method: Any = "full" if full else "lora"
    model: Survey | Reference
    if judge is not None:
        check_lr(judge, "The learning rate to judge")
    _check_widths(full, hidden_size, shape["fan_in"], model_config)
    notes: list[str] = []
    if model_config is not None:
        widths = inspection.read_widths(model_config)
        notes.append(widths_note(model_config, widths))
        if full:
            shape["fan_in"] = widths.largest
        else:
            hidden_size = widths.hidden_size
    if path is None:
        model = Reference(**shape, method=method)
    elif any(shape.values()) or hidden_size is not None:
        raise click.UsageError(
            "The files of ADAPTER already contain its rank, alpha and widths. Remove --rank,"
            " --alpha, --rslora, --fan-in, --hidden-size and --model-config."
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
        hidden_size=hidden_size,
    )
    suggestion = suggestion.with_notes(*notes)
    echo(suggestion)
    if judge is not None:
        echo(recipe.Judgement(judge, suggestion))


def _check_widths(
    full: bool, hidden_size: object, fan_in: object, model_config: object
) -> None:
    """Raise an error if a width option does not fit the method or is passed twice."""
    if full and hidden_size is not None:
        raise click.UsageError(
            "--hidden-size cannot be used with --full, because full finetuning depends on the"
            " largest fan-in. Use --fan-in or --model-config instead."
        )
    if fan_in is not None and not full:
        raise click.UsageError(
            "--fan-in can only be used with --full. For LoRA, use --hidden-size or"
            " --model-config."
        )
    if model_config is not None and (hidden_size, fan_in) != (None, None):
        raise click.UsageError(
            "The file of --model-config already contains the model's widths. Remove --hidden-size"
            " and --fan-in."
        )
