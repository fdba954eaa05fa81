"""A converted rate as lines for a trainer's configuration.

If this package has a plug-in for the trainer, the lines contain the tuned rate and its reference,
and the optimizer converts them. Otherwise they contain numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .._types import Reference
from ..errors import InvalidReferenceError
from ..integrations.external_plugins import SWIFT
from ..laws import DEFAULT_LAW
from ..transfer import Conversion


@dataclass(frozen=True)
class Change:
    """A rate tuned at `origin`, and its conversion to `target` by the law of that name."""

    lr: float
    origin: Reference
    target: Reference
    law: str
    converted: Conversion

    @property
    def alpha(self) -> str:
        """The alpha that gives the target's multiplier in a tool that divides it by the rank, also
        for rsLoRA.
        """
        return f"{self.target.scaling * (self.target.rank or 1):g}"

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a plug-in. The batch is among them if the rate moves with it."""
        settings = {"tuned_at": as_words(self.origin)}
        if self.law != DEFAULT_LAW:
            settings["law"] = self.law
        if self.origin.batch and self.target.batch not in (None, self.origin.batch):
            settings["batch"] = f"{self.target.batch:g}"
        return settings

    def summary(self) -> str:
        """Return the rate before and after in a sentence."""
        rates = f"{self.converted.lr:.3g}"
        if self.converted.lr_a != self.converted.lr_b:
            rates += f", or {self.converted.lr_a:.3g} for A and {self.converted.lr_b:.3g} for B"
        return (
            f"{self.lr:g} was tuned at {as_words(self.origin)}; at {as_words(self.target)} it is"
            f" {rates}."
        )


def configuration(tool: str, change: Change) -> str:
    """Return the lines for one of `TOOLS`.

    Raises:
        InvalidReferenceError: the target is full finetuning, or at Init[B], for which there are no
            lines.
    """
    if change.target.init == "B":
        raise InvalidReferenceError(
            "--as prints lines for adapters at Init[A], with which these tools start.",
            "Leave --as out to print the rate at Init[B].",
        )
    if change.target.method == "full":
        raise InvalidReferenceError(
            "--as prints configurations for adapters, not for full finetuning.",
            "Leave --as out to print the rate.",
        )
    comments = [f"# {line}" for line in (change.summary(), *change.converted.notes)]
    return "\n".join([*comments, *TOOLS[tool](change)])


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


def _trl(change: Change) -> Iterator[str]:
    at, settings = change.target, change.settings
    rslora = ", use_rslora=True" if at.rslora else ""
    batch = settings.pop("batch", None)
    arguments = [f"{name}={text!r}" for name, text in settings.items()]
    arguments += [] if batch is None else [f"batch={batch}"]
    yield f"peft_config = LoraConfig(r={at.rank}, lora_alpha={at.alpha:g}{rslora})"
    yield "# after trainer = SFTTrainer(..., peft_config=peft_config), or another TRL trainer:"
    yield f"rankaware_optim.integrations.attach(trainer, torch.optim.AdamW, lr={change.lr:g},"
    yield f"    {', '.join(arguments)})"


def _axolotl(change: Change) -> Iterator[str]:
    settings = ", ".join(f'{name}: "{text}"' for name, text in change.settings.items())
    yield "adapter: lora"
    yield f"lora_r: {change.target.rank}"
    yield f"lora_alpha: {change.target.alpha:g}"
    if change.target.rslora:
        yield "peft_use_rslora: true"
    yield f"learning_rate: {change.lr:g}"
    yield "plugins: [rankaware_optim.integrations.axolotl.Plugin]"
    yield f"rankaware: {{{settings}}}"


def _swift(change: Change) -> Iterator[str]:
    at = change.target
    settings = [
        f'RANKAWARE_{name.upper()}="{text}"' for name, text in change.settings.items()
    ]
    rslora = " --use_rslora true" if at.rslora else ""
    yield f"{' '.join(settings)} swift sft \\"
    yield f"    --tuner_type lora --lora_rank {at.rank} --lora_alpha {at.alpha:g}{rslora} \\"
    yield f'    --external_plugins "{SWIFT}" --optimizer rankaware \\'
    yield f"    --learning_rate {change.lr:g}"


def _kohya(change: Change) -> Iterator[str]:
    settings = [f'"rankaware_{name}={text}"' for name, text in change.settings.items()]
    yield f"--network_dim {change.target.rank} --network_alpha {change.alpha} \\"
    yield f"--learning_rate {change.lr:g} \\"
    yield "--network_module rankaware_optim.integrations.kohya \\"
    yield f"--network_args {' '.join(settings)}"


def _automodel(change: Change) -> Iterator[str]:
    to = change.converted
    multipliers = (
        ("A", to.lr_a / change.lr, to.weight_decay_scale_a),
        ("B", to.lr_b / change.lr, to.weight_decay_scale_b),
    )
    yield "# Automodel's scheduler applies the multipliers, so keep an lr_scheduler: section."
    yield "peft:"
    yield f"  dim: {change.target.rank}"
    yield f"  alpha: {change.alpha}"
    yield "optimizer:"
    yield f"  lr: {change.lr:g}"
    yield "  param_group_overrides:"
    for role, lr, decay in multipliers:
        yield f"    - {{pattern: lora_{role}, lr_mult: {lr:.6g}, wd_mult: {decay:.6g}}}"


def _diffusers(change: Change) -> Iterator[str]:
    rank = change.target.rank
    if change.target.scaling != 1.0:
        yield f"# These scripts train at alpha = rank: convert --to r={rank},alpha={rank}."
    yield f"--rank {rank} --learning_rate {change.converted.lr:.4g}"


def _onetrainer(change: Change) -> Iterator[str]:
    yield f"LoRA rank: {change.target.rank}"
    yield f"LoRA alpha: {change.alpha}"
    yield f"Learning rate: {change.converted.lr:.4g}"


TOOLS: dict[str, Callable[[Change], Iterator[str]]] = {
    "automodel": _automodel,
    "axolotl": _axolotl,
    "diffusers": _diffusers,
    "kohya": _kohya,
    "onetrainer": _onetrainer,
    "swift": _swift,
    "trl": _trl,
}
