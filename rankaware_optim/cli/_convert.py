"""This module defines `rankaware convert`, which converts a tuned learning rate.

The command `rankaware convert` calls the function `convert_lr` in
`transfer/_convert.py`. The command prints the converted learning rate as a table, as
JSON, or as lines for the configuration of a trainer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from .. import inspection, transfer
from .. import optimizer as optimizers
from .._optimizers import get_optimizer_class
from .._rate import Rate
from .._types import Reference
from ..errors import InvalidReferenceError
from ..laws import DEFAULT_LAW, Law, get_law
from ._options import (
    MODEL_CONFIG,
    RATE_FIELDS,
    echo,
    echo_result,
    flag,
    law_option,
    may_name_module,
    option,
    rate_document,
    widths_note,
)

_SHAPE = (
    f"an object. Fields: {RATE_FIELDS}, from_lr (per step), from and to (as for --from and"
    " --to)."
)

# The lines for each trainer, with the values of `_lines` in braces. Lines that mention rsLoRA are
# left out without it. The names for Axolotl, LLaMA-Factory, ms-swift and Unsloth were taken from
# their schemas in versions 0.19.0, 0.9.5, 4.6.0 and 2026.10.9. A test runs TRL's lines.
TOOLS = {
    "ai-toolkit": """\
# Transformers such as FLUX train at alpha = rank: convert --to r={rank},alpha={rank}.
network:
  type: lora
  linear: {rank}
  linear_alpha: {alpha_over_rank}
train:
  lr: {converted}""",
    "automodel": """\
peft:
  dim: {rank}
  alpha: {alpha_over_rank}
optimizer:
  lr: {converted}""",
    "axolotl": """\
adapter: lora
lora_r: {rank}
lora_alpha: {alpha}
lora_target_linear: true  # or the layers of your run
peft_use_rslora: true
learning_rate: {converted}""",
    "diffusers": """\
# These scripts train at alpha = rank: convert --to r={rank},alpha={rank}.
--rank {rank} --learning_rate {converted}""",
    "kohya": """\
--network_dim {rank} --network_alpha {alpha_over_rank} \\
--learning_rate {converted}""",
    "llamafactory": """\
finetuning_type: lora
lora_rank: {rank}
lora_alpha: {alpha}
lora_target: all  # or the layers of your run
use_rslora: true
learning_rate: {converted}""",
    "mlx": """\
fine_tune_type: lora
learning_rate: {converted}
lora_parameters:  # all three are required; scale multiplies, it is no alpha
  rank: {rank}
  scale: {scaling}
  dropout: 0.0""",
    "onetrainer": """\
LoRA rank: {rank}
LoRA alpha: {alpha_over_rank}
Learning rate: {converted}""",
    "swift": """\
--tuner_type lora --lora_rank {rank} --lora_alpha {alpha} \\
--use_rslora true \\
--learning_rate {converted} --target_modules all-linear  # or the layers of your run""",
    "trl": """\
import rankaware_optim, torch
from peft import LoraConfig

peft_config = LoraConfig(
    r={rank},
    lora_alpha={alpha},
    use_rslora=True,
    target_modules="all-linear",  # or the layers of your run
)
# after trainer = SFTTrainer(..., peft_config=peft_config), or another TRL trainer:
rankaware_optim.attach(trainer, torch.optim.AdamW, lr={lr:g},
    tuned_at={tuned_at!r}, law={law!r}, batch={batch})""",
    "unsloth": """\
from unsloth import FastLanguageModel
from trl import SFTConfig

layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = FastLanguageModel.get_peft_model(
    model,
    r={rank},
    lora_alpha={alpha},
    use_rslora=True,
    target_modules=layers,  # or those of your run
)
args = SFTConfig(learning_rate={converted})""",
    "verl": """\
actor_rollout_ref.model.lora_rank={rank} \\
actor_rollout_ref.model.lora_alpha={alpha_over_rank} \\
actor_rollout_ref.actor.optim.lr={converted}""",
}


_SUMMARY = "# {lr:g} was tuned at {tuned_at}; at {to} it is {converted}."


def _lines(tool: str, at: Reference, converted: Rate, **given: object) -> str:
    """Return the lines that set the converted learning rate in the configuration of a
    trainer, after comments on this learning rate.

    Raises:
        InvalidReferenceError: the configuration is full finetuning or has the init B, for which
            there are no lines.
    """
    if at.init == "B" or at.method == "full":
        raise InvalidReferenceError(
            "--as can only print the settings of a LoRA adapter whose matrix B starts at zero, but"
            f" --to describes {at}.",
            "Remove --as to print only the learning rate.",
        )
    values = {
        "rank": at.rank,
        "alpha": f"{at.alpha:g}",
        # for tools that divide alpha by the rank even with rsLoRA
        "alpha_over_rank": f"{at.scaling * (at.rank or 1):g}",
        "scaling": f"{at.scaling:g}",
        "batch": at.batch,
        "converted": f"{converted.lr:.4g}",
        **given,
    }
    notes = [f"# {note}" for note in converted.notes]
    lines = TOOLS[tool].splitlines()
    if not at.rslora:
        lines = [line for line in lines if "rslora" not in line]
    lines = [line.format(**values) for line in lines]
    return "\n".join([_SUMMARY.format(**values), *notes, *lines])


# --- the command ----------------------------------------------------------------------------------


@click.command(options_metavar="--from r=16,alpha=32 --to r=64 [OPTIONS]")
@click.argument("lr", type=float)
@option(
    "--from from_",
    str,
    "The configuration at which LR was tuned, such as r=16,alpha=32 or full,fan_in=4096, or the"
    " path of an adapter.",
    required=True,
)
@option(
    "--to",
    str,
    "The new configuration, such as r=128,alpha=16,rslora or full. Without alpha, as in r=64, alpha"
    " stays the same. The width fan_in is the mean fan-in for LoRA, and the largest fan-in for full"
    " finetuning (from init B the mean). If only one of --from and --to states it, it is used for"
    " both. If neither does, 4096 is assumed.",
    required=True,
)
@MODEL_CONFIG
@law_option("The scaling law.", DEFAULT_LAW)
@option(
    "--optimizer",
    str,
    "The optimizer, if it is not a variant of Adam: a name such as SGD, or package:Class.",
    callback=may_name_module,
)
@option(
    "--dtype",
    click.Choice(("float32", "bfloat16", "float16")),
    "Dtype in which the weights train, for --to full. In bfloat16, large models need a higher"
    " learning rate, and the command prints how many of the weights a step leaves unchanged.",
)
@option(
    "--as tool",
    click.Choice(list(TOOLS)),
    "Print the configuration of a trainer, ready to paste.",
)
@flag("--json as_json", f"Print JSON: {_SHAPE}")
def convert(
    lr: float,
    from_: str,
    to: str,
    model_config: Path | None,
    law: str | Law,
    optimizer: str | None,
    dtype: str | None,
    tool: str | None,
    as_json: bool,
) -> None:
    """Convert a tuned learning rate to another rank, alpha, width, batch size or
    training method.

    LR is the learning rate that was tuned for the configuration --from.
    """
    if tool and (optimizer or as_json):
        raise click.UsageError(
            "--as prints a trainer's configuration with AdamW, so it cannot be used together with"
            " --optimizer or --json. Remove --optimizer and --json, or remove --as."
        )
    origin = inspection.as_reference(from_)
    at = inspection.as_reference(to, like=origin)
    widths = None if model_config is None else inspection.read_widths(model_config)
    if widths is not None:
        # from A = 0 full finetuning's learning rate depends on the mean too
        has_mean = "B" in (origin.init, at.init)
        of_full = widths.mean if has_mean else widths.largest
        from_, origin = _with_width(from_, origin, widths.mean, of_full)
        to, at = _with_width(to, at, widths.mean, of_full)
    if dtype and at.method != "full":
        raise click.UsageError(
            "--dtype can only be used with --to full. For a LoRA adapter, remove --dtype. The"
            " optimizer's report shows the dtype."
        )
    moved_by = get_law(law)
    if optimizer is not None:
        moved_by = moved_by.bind(get_optimizer_class(optimizer), {})
    rate = transfer.convert_lr(lr, from_=origin, to=at, law=moved_by, dtype=dtype)
    if dtype and (unmoved := optimizers.rounding_of_normal(rate.lr, dtype)):
        rate = rate.with_notes(unmoved)
    if model_config is not None and widths is not None:
        rate = rate.with_notes(widths_note(model_config, widths))
    if tool:
        if isinstance(law, Law):  # of a module that the user typed
            law = f"{type(law).__module__}:{type(law).__qualname__}"
        echo(_lines(tool, at, rate, lr=lr, tuned_at=from_, to=to, law=law))
        return
    document = {"from_lr": lr, "from": from_, "to": to, **rate_document(rate)}
    echo_result(as_json, rate, document)


def _with_width(
    text: str, at: Reference, of_lora: float, of_full: float
) -> tuple[str, Reference]:
    """If the user's configuration, such as "r=16,alpha=32", contains no width, add the
    width of the model to it.
    """
    if at.fan_in is not None:
        return text, at
    width = of_full if at.method == "full" else of_lora
    return f"{text},fan_in={width:g}", replace(at, fan_in=width)
