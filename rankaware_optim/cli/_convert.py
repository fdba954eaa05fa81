"""`rankaware convert`: convert a rate to another rank, alpha, width, batch or method.

It is printed as numbers, or as lines for a trainer's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import click

from .. import inspection, transfer
from .. import optimizer as optimizers
from .._optimizers import get_optimizer_class
from .._rate import Rate
from .._types import Reference
from ..errors import InvalidReferenceError
from ..laws import DEFAULT_LAW, bound_law, get_law
from ._options import (
    RATE_FIELDS,
    echo,
    echo_result,
    json_option,
    law_option,
    may_name_module,
    option,
)

_SHAPE = (
    f"an object. Fields: {RATE_FIELDS}, from_lr (per step), from and to (as for --from and"
    " --to)."
)

# --- a trainer's configuration --------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A trainer's lines, with the names of `_lines`'s values in braces.

    rslora: what says rsLoRA. at_rank: what trains at alpha = rank, whatever alpha is. has_layers:
    whether the lines name the adapted layers, which are all linear ones.
    """

    lines: str
    rslora: str = ""
    at_rank: str = ""
    has_layers: bool = False


_ALL_LINEAR = (
    "All linear layers are adapted here: name those of your run if they were fewer."
)


# The names of Axolotl, LLaMA-Factory, ms-swift and Unsloth were read in their own schemas, of
# 0.19.0, 0.9.5, 4.6.0 and 2026.10.9. A test runs TRL's lines.
TOOLS = {
    "ai-toolkit": Tool(
        """\
{other_alpha}network:
  type: lora
  linear: {rank}
  linear_alpha: {alpha_over_rank}
train:
  lr: {converted}""",
        at_rank="Transformers such as FLUX",
    ),
    "automodel": Tool("""\
peft:
  dim: {rank}
  alpha: {alpha_over_rank}
optimizer:
  lr: {converted}"""),
    "axolotl": Tool(
        """\
adapter: lora
lora_r: {rank}
lora_alpha: {alpha}
lora_target_linear: true
{rslora}learning_rate: {converted}""",
        rslora="peft_use_rslora: true\n",
        has_layers=True,
    ),
    "diffusers": Tool(
        "{other_alpha}--rank {rank} --learning_rate {converted}",
        at_rank="These scripts",
    ),
    "kohya": Tool("""\
--network_dim {rank} --network_alpha {alpha_over_rank} \\
--learning_rate {converted}"""),
    "llamafactory": Tool(
        """\
finetuning_type: lora
lora_rank: {rank}
lora_alpha: {alpha}
lora_target: all
{rslora}learning_rate: {converted}""",
        rslora="use_rslora: true\n",
        has_layers=True,
    ),
    "mlx": Tool("""\
fine_tune_type: lora
learning_rate: {converted}
lora_parameters:  # all three are required; scale multiplies, it is no alpha
  rank: {rank}
  scale: {scaling}
  dropout: 0.0"""),
    "onetrainer": Tool("""\
LoRA rank: {rank}
LoRA alpha: {alpha_over_rank}
Learning rate: {converted}"""),
    "swift": Tool(
        """\
--tuner_type lora --lora_rank {rank} --lora_alpha {alpha}{rslora} \\
--target_modules all-linear --learning_rate {converted}""",
        rslora=" --use_rslora true",
        has_layers=True,
    ),
    "trl": Tool(
        """\
import rankaware_optim, torch
from peft import LoraConfig

peft_config = LoraConfig(
    r={rank}, lora_alpha={alpha}{rslora}, target_modules="all-linear"
)
# after trainer = SFTTrainer(..., peft_config=peft_config), or another TRL trainer:
rankaware_optim.attach(trainer, torch.optim.AdamW, lr={lr},
    {settings})""",
        rslora=", use_rslora=True",
        has_layers=True,
    ),
    "unsloth": Tool(
        """\
from unsloth import FastLanguageModel
from trl import SFTConfig

layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = FastLanguageModel.get_peft_model(
    model, r={rank}, lora_alpha={alpha}{rslora}, target_modules=layers
)
args = SFTConfig(learning_rate={converted})""",
        rslora=", use_rslora=True",
        has_layers=True,
    ),
    "verl": Tool("""\
actor_rollout_ref.model.lora_rank={rank} \\
actor_rollout_ref.model.lora_alpha={alpha_over_rank} \\
actor_rollout_ref.actor.optim.lr={converted}"""),
}


def _lines(
    tool: Tool,
    lr: float,
    origin: Reference,
    at: Reference,
    law: str,
    to: Rate,
) -> str:
    """Return a trainer's lines at `at` for a rate tuned at `origin`, that the law converts to `to`.

    Raises:
        InvalidReferenceError: `at` is full finetuning, or at A = 0, for which there are no lines.
    """
    if at.init == "B" or at.method == "full":
        raise InvalidReferenceError(
            "--as prints lines for adapters at init A, with which these tools start.",
            "Leave --as out to print the rate.",
        )
    other_alpha = (
        f"# {tool.at_rank} train at alpha = rank: convert --to"
        f" r={at.rank},alpha={at.rank}.\n"
    )
    summary = (
        f"{lr:g} was tuned at {as_words(origin)}; at {as_words(at)} it is {to.lr:.3g}."
    )
    lines = tool.lines.format(
        rank=at.rank,
        alpha=f"{at.alpha:g}",
        # of a tool that divides it by the rank, also for rsLoRA
        alpha_over_rank=f"{at.scaling * (at.rank or 1):g}",
        scaling=f"{at.scaling:g}",
        rslora=tool.rslora if at.rslora else "",
        other_alpha="" if at.scaling == 1.0 else other_alpha,
        lr=f"{lr:g}",
        converted=f"{to.lr:.4g}",
        settings=", ".join(_settings(origin, at, law)),
    )
    comments = [summary, *to.notes]
    if tool.has_layers:
        comments.append(_ALL_LINEAR)
    return "\n".join([*(f"# {line}" for line in comments), lines])


def _settings(origin: Reference, at: Reference, law: str) -> Iterator[str]:
    """Yield attach's settings. The batch is among them if the rate moves with it."""
    yield f"tuned_at={as_words(origin)!r}"
    if law != DEFAULT_LAW:
        yield f"law={law!r}"
    if origin.batch and at.batch not in (None, origin.batch):
        yield f"batch={at.batch:g}"


def as_words(reference: Reference) -> str:
    """Return a reference as a text for `parse_reference`.

    >>> as_words(Reference(rank=16, alpha=32, rslora=True, fan_in=4096))
    'r=16,alpha=32,rslora,fan_in=4096'
    """
    parts = ["full"]
    if reference.method == "lora":
        parts = [f"r={reference.rank}", f"alpha={reference.alpha:g}"]
        parts += ["rslora"] * reference.rslora + ["init=B"] * (reference.init == "B")
    for name in ("fan_in", "batch"):
        value = getattr(reference, name)
        if value is not None:
            parts.append(f"{name}={value:g}")
    return ",".join(parts)


# --- the command ----------------------------------------------------------------------------------


@click.command(options_metavar="--from r=16,alpha=32 --to r=64 [OPTIONS]")
@click.argument("lr", type=float)
@option(
    "--from from_",
    str,
    "Configuration at which LR was tuned: r=16,alpha=32, or full,fan_in=4096, or the path of an"
    " adapter.",
    required=True,
)
@option(
    "--to",
    str,
    "New configuration, such as r=128,alpha=16,rslora or full. r=64 alone keeps alpha. The width"
    " fan_in is the mean fan-in for LoRA and the largest for full finetuning (from init B the"
    " mean). One that only --from or --to has is used for both, and 4096 if neither has one.",
    required=True,
)
@law_option("Law that moves the rate.", DEFAULT_LAW)
@option(
    "--optimizer",
    str,
    "Optimizer, if it is no variant of Adam: a name such as SGD, or package:Class.",
    callback=may_name_module,
)
@option(
    "--dtype",
    click.Choice(("float32", "bfloat16", "float16")),
    "Dtype of the weights, for --to full: says how many of them the rate leaves where they are.",
)
@option(
    "--as tool",
    click.Choice(list(TOOLS)),
    "Print a trainer's configuration, ready to paste.",
)
@json_option(_SHAPE)
def convert(
    lr: float,
    from_: str,
    to: str,
    law: str,
    optimizer: str | None,
    dtype: str | None,
    tool: str | None,
    as_json: bool,
) -> None:
    """Convert a tuned rate to another rank, alpha, width, batch or method.

    LR is the learning rate that was tuned at --from.
    """
    if tool and (optimizer or as_json):
        raise click.UsageError(
            "--as prints a trainer's configuration with AdamW, so leave --optimizer and --json out."
        )
    origin = inspection.as_reference(from_)
    at = inspection.as_reference(to, like=origin)
    if dtype and at.method != "full":
        raise click.UsageError(
            "--dtype is for --to full. An adapter's own values are read by the wrapper: its report"
            " says it."
        )
    moved_by = get_law(law)
    if optimizer is not None:
        moved_by = bound_law(moved_by, get_optimizer_class(optimizer), {})
    rate = transfer.convert_lr(lr, from_=origin, to=at, law=moved_by)
    if dtype and (unmoved := optimizers.rounding_of_normal(rate.lr, dtype)):
        rate = replace(rate, notes=(*rate.notes, unmoved))
    if tool:
        echo(_lines(TOOLS[tool], lr, origin, at, law, rate))
        return
    places = {"from": as_words(origin), "to": as_words(at)}
    echo_result(as_json, rate, {"from_lr": lr, **places, **asdict(rate)})
