"""From LoRA to full finetuning: a law's number, or on large models a ratio that others measured.

On small networks the scaling law predicts full finetuning's learning rate. On large language models
it was too low in bfloat16 and not better than one ratio in float32, so there the law leads to rank
16 and alpha 32 only, and a constant ratio leads on from there. The numbers are from
benchmarks/laws/full_finetuning.py (results/full_finetuning.md), by a rule that was written first.
"""

from __future__ import annotations

from dataclasses import replace

from .._types import Factor, Reference
from ._law import Law, checked_multiplier
from ._mua import SIGN_LIKE, MuA, Power, layers_of

# LoRA's best learning rate at rank 16 and alpha 32 over full finetuning's in float32: the geometric
# mean over five sources.
FULL_RATIO = 26.0
FULL_RATIO_AT = Reference(rank=16, alpha=32)
# LoRA's width (the mean fan-in) from which the ratio holds. The study's networks are narrower, and
# there the law is nearer.
WIDE = 1024.0
# Weights that train in bfloat16 round small steps away, so that their best learning rate is higher:
# AReaL moved GRPO from bfloat16 to float32 weights and divided the learning rate by it.
BFLOAT16 = 2.8
# 1.645 standard deviations of the error on sources that were left out, as a factor.
FULL_TRUST_FACTOR = 2.7
FULL_TRUST = (
    "Nine in ten of the best learning rates for full finetuning lie within a factor of"
    f" {FULL_TRUST_FACTOR:g} of the one that is converted from LoRA."
)


def is_measured(law: Law, lora: Reference, *, of_recipe: bool = False) -> bool:
    """Return whether the measured ratio replaces the law between LoRA and full finetuning.

    It was measured with Adam, with B = 0 and at large widths. The paper's own law stays as its
    authors state it, and so does a law of another kind. A `Power` has a factor of its own for full
    finetuning, which a calibration fits. In a recipe without full runs nothing was fitted.

    Args:
        law: the scaling law, bound to the optimizer.
        lora: the LoRA configuration, with its fan-in.
        of_recipe: whether the law is that of a recipe without full runs.
    """
    *corrections, inner = layers_of(law)
    if any(isinstance(each, Power) for each in corrections) and not of_recipe:
        return False
    of_adam = isinstance(inner, MuA) and inner.family in SIGN_LIKE
    finite = isinstance(inner, MuA) and inner.tokens is not None
    of_lora = lora.method == "lora" and lora.init == "A"
    return of_adam and finite and of_lora and (lora.fan_in or 0.0) >= WIDE


def to_full(
    law: Law,
    full: Factor,
    lora: Reference,
    dtype: str = "",
    *,
    of_recipe: bool = False,
) -> float:
    """Return the number that multiplies a LoRA learning rate for full finetuning.

    Args:
        law: the scaling law, bound to the optimizer.
        full: the weight that trains, with the model's largest fan-in.
        lora: where the LoRA learning rate was tuned, with its fan-in.
        dtype: the name of the dtype in which the weights train, such as "bfloat16". "" stands for
            float32, or float32 masters.
        of_recipe: whether the law is that of a recipe without full runs.

    Raises:
        LawError: the law has no usable multiplier there.
    """
    if not is_measured(law, lora, of_recipe=of_recipe):
        return checked_multiplier(law, full, lora)
    middle = replace(FULL_RATIO_AT, fan_in=lora.fan_in)
    ratio = FULL_RATIO / (BFLOAT16 if dtype == "bfloat16" else 1.0)
    return checked_multiplier(law, middle.as_factor(), lora) / ratio


def from_full(
    law: Law, lora: Factor, full: Reference, *, of_recipe: bool = False
) -> float:
    """Return the number that multiplies full finetuning's learning rate for a LoRA matrix: the
    inverse of `to_full`, for weights that trained in float32.

    Raises:
        LawError: the law has no usable multiplier there.
    """
    middle = replace(FULL_RATIO_AT, fan_in=lora.fan_in)
    if lora.init != "A" or not is_measured(law, middle, of_recipe=of_recipe):
        return checked_multiplier(law, lora, full)
    return FULL_RATIO * checked_multiplier(law, lora, middle)
