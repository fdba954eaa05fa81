"""`rankaware convert`: convert a rate to another rank, alpha, init or method.

It is printed as numbers, or as lines for a trainer's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from .. import inspection, transfer
from .._types import Reference
from ..errors import InvalidReferenceError
from ..laws import DEFAULT_LAW, Law, bound_law, get_law
from ._options import FILE, echo_result, json_option, law_option, option

_SHAPE = (
    "a list with one object per rate. Fields: part (of the adapter; null if LR is given), from_lr"
    " (per step), from and to (as for --from and --to), lr (one rate for both factors), lr_a and"
    " lr_b (a rate for each), eps_scale_a, eps_scale_b, weight_decay_scale_a and"
    " weight_decay_scale_b (factors, for use with lr_a and lr_b), a_scale (factor of another exact"
    " form), exact (whether lr_a and lr_b undo the change), notes (sentences). low is 0, high and"
    " ceiling are null, extrapolated is false and configuration is empty."
)

# --- a trainer's configuration --------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A trainer's lines, with the names of `_lines`'s values in braces.

    rslora: what says rsLoRA. at_rank: what trains at alpha = rank, whatever alpha is.
    """

    lines: str
    rslora: str = ""
    at_rank: str = ""


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
# Automodel's scheduler applies the multipliers, so keep an lr_scheduler: section.
peft:
  dim: {rank}
  alpha: {alpha_over_rank}
optimizer:
  lr: {lr}
  param_group_overrides:
    - {{pattern: lora_A, lr_mult: {times_a:.6g}, wd_mult: {decay_a:.6g}}}
    - {{pattern: lora_B, lr_mult: {times_b:.6g}, wd_mult: {decay_b:.6g}}}"""),
    "axolotl": Tool(
        """\
adapter: lora
lora_r: {rank}
lora_alpha: {alpha}
{rslora}learning_rate: {converted}""",
        rslora="peft_use_rslora: true\n",
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
{rslora}learning_rate: {converted}""",
        rslora="use_rslora: true\n",
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
--learning_rate {converted}""",
        rslora=" --use_rslora true",
    ),
    "trl": Tool(
        """\
peft_config = LoraConfig(r={rank}, lora_alpha={alpha}{rslora})
# after trainer = SFTTrainer(..., peft_config=peft_config), or another TRL trainer:
rankaware_optim.integrations.attach(trainer, torch.optim.AdamW, lr={lr},
    {settings})""",
        rslora=", use_rslora=True",
    ),
    "unsloth": Tool(
        """\
model = FastLanguageModel.get_peft_model(model, r={rank}, lora_alpha={alpha}{rslora})
args = SFTConfig(learning_rate={converted})""",
        rslora=", use_rslora=True",
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
    to: transfer.Conversion,
) -> str:
    """Return a trainer's lines at `at` for a rate tuned at `origin`, that the law converts to `to`.

    Raises:
        InvalidReferenceError: `at` is full finetuning, or at Init[B], for which there are no lines.
    """
    if at.init == "B":
        raise InvalidReferenceError(
            "--as prints lines for adapters at Init[A], with which these tools start.",
            "Leave --as out to print the rate at Init[B].",
        )
    if at.method == "full":
        raise InvalidReferenceError(
            "--as prints configurations for adapters, not for full finetuning.",
            "Leave --as out to print the rate.",
        )
    other_alpha = (
        f"# {tool.at_rank} train at alpha = rank: convert --to"
        f" r={at.rank},alpha={at.rank}.\n"
    )
    rates = f"{to.lr:.3g}"
    if to.lr_a != to.lr_b:
        rates += f", or {to.lr_a:.3g} for A and {to.lr_b:.3g} for B"
    summary = (
        f"{lr:g} was tuned at {as_words(origin)}; at {as_words(at)} it is {rates}."
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
        times_a=to.lr_a / lr,
        times_b=to.lr_b / lr,
        decay_a=to.weight_decay_scale_a,
        decay_b=to.weight_decay_scale_b,
        settings=", ".join(_settings(origin, at, law)),
    )
    return "\n".join([*(f"# {line}" for line in (summary, *to.notes)), lines])


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


@click.command()
@click.argument("lr", type=float, required=False)
@option(
    "--from from_",
    str,
    "Configuration at which LR was tuned: r=16,alpha=32, or full,fan_in=4096, or the path of an"
    " adapter. PEFT's names are read too: r=16,lora_alpha=32,use_rslora=True.",
    required=True,
)
@option(
    "--to",
    str,
    "New configuration, such as r=128,alpha=16,rslora or full. r=64 alone keeps alpha. The width"
    " fan_in is the mean fan-in for LoRA and the largest for full finetuning (from Init[B] the"
    " mean). One that only --from or --to has is used for both.",
    required=True,
)
@law_option("Law that moves the rate.", DEFAULT_LAW)
@option(
    "--model",
    FILE,
    "Model's folder or config.json, of transformers or diffusers. Its width is read as the"
    " optimizer reads it, so LR becomes the rate at which the optimizer trains.",
)
@option(
    "--target-modules",
    str,
    "Layers of --model to adapt, as for PEFT: q_proj,v_proj or all-linear.",
)
@option(
    "--as tool",
    click.Choice(list(TOOLS)),
    "Print a trainer's configuration, ready to paste.",
)
@json_option(_SHAPE)
def convert(
    lr: float | None,
    from_: str,
    to: str,
    law: str,
    model: Path | None,
    target_modules: str | None,
    tool: str | None,
    as_json: bool,
) -> None:
    """Convert a tuned rate to another rank, alpha, init or method.

    LR is the learning rate that was tuned at --from. Without LR, the rates that kohya's scripts
    wrote into the adapter --from are converted, one for each part, such as the UNet.
    """
    if tool and as_json:
        raise click.UsageError(
            "--as prints a trainer's configuration and --json the numbers. Give one of them."
        )
    if model is not None and lr is None:
        raise click.UsageError("--model is of one rate, so give LR too.")
    names = _layers(model, target_modules)
    bound: Law = get_law(law)
    if lr is None:
        bound, rates = _trained(from_, bound)
    else:
        rates = [(None, lr, inspection.as_reference(from_), "")]
    documents, texts = [], []
    printed = set[str]()
    for part, tuned, origin, training in rates:
        at = transfer.as_target(to, origin, model)
        conversion = transfer.convert_lr(
            tuned,
            from_=origin,
            to=at,
            law=bound,
            model=model,
            target_modules=names,
        )
        places = {"from": as_words(origin), "to": as_words(at)}
        numbers = {"part": part, "from_lr": tuned, **places, **asdict(conversion)}
        documents.append(numbers)
        texts += [f"{'# ' if tool else ''}{training}"] if training else []
        notes = tuple(note for note in conversion.notes if note not in printed)
        printed.update(notes)
        conversion = replace(conversion, notes=notes)
        texts.append(
            _lines(TOOLS[tool], tuned, origin, at, law, conversion)
            if tool
            else conversion.explain()
        )
    echo_result(as_json, "\n".join(texts), documents)


def _layers(model: Path | None, target_modules: str | None) -> str | list[str] | None:
    """Return the layers to adapt, as PEFT takes them."""
    if target_modules is None:
        return None
    if model is None:
        raise click.UsageError(
            "--target-modules are layers of --model, so give it too."
        )
    if target_modules == "all-linear":
        return target_modules
    return [name.strip() for name in target_modules.split(",")]


_Tuned = tuple[str | None, float, Reference, str]


def _trained(path: str, law: Law) -> tuple[Law, list[_Tuned]]:
    """Return the law bound to the adapter's optimizer, and the rates of the adapter's parts: part,
    rate, reference, and how it was trained, in words.
    """
    training = inspection.read_training(path)
    by = ""
    if training.optimizer:
        law = bound_law(law, training.optimizer_class, training.settings)
        by = f" by {training.optimizer}"
    during = f" over {training.steps} steps" if training.steps else ""
    rates: list[_Tuned] = []
    for part, lr, survey in training.rates:
        at = inspection.reference_of(survey)
        words = f"{part or 'The adapter'} was trained at {lr:g}, {at}{by}{during}."
        rates.append((part or None, lr, at, words))
    return law, rates
