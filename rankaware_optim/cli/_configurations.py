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
        """The settings of a plug-in."""
        law = {} if self.law == DEFAULT_LAW else {"law": self.law}
        return {
            "tuned_at": as_words(self.origin),
            **law,
            **({} if self.batch is None else {"batch": self.batch}),
        }

    @property
    def batch(self) -> str | None:
        """The batch, if the rate moves with it."""
        moves = self.origin.batch is not None and self.target.batch not in (None, self.origin.batch)
        return f"{self.target.batch:g}" if moves else None


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
    found = (
        f"{change.lr:g} was tuned at {as_words(change.origin)}; at {as_words(change.target)} it is "
    )
    converted = change.converted
    rates = f"{converted.lr_a:.3g} for A and {converted.lr_b:.3g} for B"
    found += (
        f"{converted.lr:.3g}."
        if converted.lr_a == converted.lr_b
        else f"{converted.lr:.3g}, or {rates}."
    )
    return "\n".join(
        [f"# {line}" for line in (found, *converted.notes)] + list(TOOLS[tool](change))
    )


def as_words(reference: Reference) -> str:
    """Return a reference as a text for `parse_reference`.

    >>> as_words(Reference(rank=16, alpha=32, rslora=True, fan_in=4096))
    'r=16,alpha=32,rslora,fan_in=4096'
    """
    full = reference.method == "full"
    parts = ["full"] if full else [f"r={reference.rank}", f"alpha={reference.alpha:g}"]
    if not full:
        parts += ["rslora"] * reference.rslora + ["init=B"] * (reference.init == "B")
    sizes = (("fan_in", reference.fan_in), ("batch", reference.batch))
    return ",".join([*parts, *(f"{name}={value:g}" for name, value in sizes if value is not None)])


def _trl(change: Change) -> Iterator[str]:
    rank, alpha = change.target.rank, change.target.alpha
    rslora = ", use_rslora=True" if change.target.rslora else ""
    more = "" if change.law == DEFAULT_LAW else f", law={change.law!r}"
    more += "" if change.batch is None else f", batch={change.batch}"
    at = change.origin
    fields = {"rank": at.rank, "alpha": at.alpha, "fan_in": at.fan_in, "batch": at.batch}
    said = [f"{name}={value:g}" for name, value in fields.items() if value is not None]
    said += (
        ["rslora=True"] * at.rslora
        + ["init='B'"] * (at.init == "B")
        + ["method='full'"] * (at.method == "full")
    )
    yield f"peft_config = LoraConfig(r={rank}, lora_alpha={alpha:g}{rslora})"
    yield "# after trainer = SFTTrainer(..., peft_config=peft_config), or another TRL trainer:"
    yield f"rankaware_optim.integrations.attach(trainer, torch.optim.AdamW, lr={change.lr:g}{more},"
    yield f"    tuned_at=rankaware_optim.Reference({', '.join(said)}))"


def _axolotl(change: Change) -> Iterator[str]:
    yield "adapter: lora"
    yield f"lora_r: {change.target.rank}"
    yield f"lora_alpha: {change.target.alpha:g}"
    if change.target.rslora:
        yield "peft_use_rslora: true"
    yield f"learning_rate: {change.lr:g}"
    yield "plugins: [rankaware_optim.integrations.axolotl.Plugin]"
    yield (
        "rankaware: {"
        + ", ".join(f'{name}: "{text}"' for name, text in change.settings.items())
        + "}"
    )


def _swift(change: Change) -> Iterator[str]:
    said = " ".join(f'RANKAWARE_{name.upper()}="{text}"' for name, text in change.settings.items())
    rslora = " --use_rslora true" if change.target.rslora else ""
    yield f"{said} swift sft \\"
    yield (
        f"    --tuner_type lora --lora_rank {change.target.rank} --lora_alpha"
        f" {change.target.alpha:g}{rslora} \\"
    )
    yield f'    --external_plugins "{SWIFT}" --optimizer rankaware \\'
    yield f"    --learning_rate {change.lr:g}"


def _kohya(change: Change) -> Iterator[str]:
    said = " ".join(f'"rankaware_{name}={text}"' for name, text in change.settings.items())
    yield (
        f"--network_dim {change.target.rank} --network_alpha {change.alpha} --learning_rate"
        f" {change.lr:g} \\"
    )
    yield f"--network_module rankaware_optim.integrations.kohya --network_args {said}"


def _automodel(change: Change) -> Iterator[str]:
    made = change.converted
    yield "# Automodel's scheduler applies the multipliers, so keep an lr_scheduler: section."
    yield "peft:"
    yield f"  dim: {change.target.rank}"
    yield f"  alpha: {change.alpha}"
    yield "optimizer:"
    yield f"  lr: {change.lr:g}"
    yield "  param_group_overrides:"
    for role, lr, decay in (
        ("A", made.lr_a, made.weight_decay_scale_a),
        ("B", made.lr_b, made.weight_decay_scale_b),
    ):
        yield f"    - {{pattern: lora_{role}, lr_mult: {lr / change.lr:.6g}, wd_mult: {decay:.6g}}}"


def _diffusers(change: Change) -> Iterator[str]:
    if change.target.scaling != 1.0:
        yield (
            "# These scripts train at alpha = rank: convert --to"
            f" r={change.target.rank},alpha={change.target.rank}."
        )
    yield f"--rank {change.target.rank} --learning_rate {change.converted.lr:.4g}"


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
