"""This module converts learning rates between LoRA and full finetuning.

For small networks, the scaling law predicts the learning rate of full finetuning. For large
language models in bfloat16, the learning rate that the scaling law predicts for full finetuning was
too low. In float32, the scaling law did not predict the learning rate of full finetuning better
than a constant ratio to LoRA's learning rate. For large language models, the conversion to full
finetuning therefore has two steps. The scaling law converts the learning rate to a LoRA adapter of
rank 16 and alpha 32. A constant ratio, which other people measured, then converts it to full
finetuning. The script benchmarks/laws/full_finetuning.py computes the ratio
(results/full_finetuning.md). The rule by which the script computes the ratio was written down
before the results were known.
"""

from __future__ import annotations

from dataclasses import replace

from .._types import Factor, Reference
from ._law import Law, checked_multiplier
from ._mua import SIGN_LIKE, MuA, Power, layers_of

# The best learning rate of LoRA at rank 16 and alpha 32, divided by the best learning rate
# of full finetuning in float32. This is the geometric mean over five sources.
FULL_RATIO = 26.0
FULL_RATIO_AT = Reference(rank=16, alpha=32)
# The ratio is used if the mean fan-in of the adapted layers is at least this large. The
# networks of this project's study are narrower, and for them the law is more accurate.
WIDE = 1024.0
# Small steps are lost to rounding in bfloat16 weights, so their best learning rate is
# higher. AReaL divided its learning rate by this factor when it changed GRPO from bfloat16
# to float32 weights.
BFLOAT16 = 2.8
# Each source was predicted from the other sources. This factor is 1.645 standard
# deviations of the prediction error, which gives a 90 % interval.
FULL_TRUST_FACTOR = 2.7
FULL_TRUST = (
    "In nine out of ten cases the best learning rate for full finetuning lies within a factor of"
    f" {FULL_TRUST_FACTOR:g} of the learning rate that is converted from LoRA."
)


def is_measured(law: Law, lora: Reference, *, of_recipe: bool = False) -> bool:
    """Return whether the constant ratio `FULL_RATIO` converts learning rates between LoRA
    and full finetuning, instead of the scaling law.

    The constant ratio between LoRA and full finetuning is only used where it was
    measured: Adam, LoRA with B starting at zero, and wide layers. The constant ratio
    does not replace the published scaling law µA (`mua-paper`) or a scaling law that is
    not based on µA. The constant ratio also does not replace a `Power` law, because a
    calibration fits this law's factor for full finetuning to trials. If a recipe has no
    trials of full finetuning, its `Power` law has no fitted factor for full finetuning,
    so the constant ratio replaces the `Power` law.

    Args:
        law: the scaling law, bound to the optimizer.
        lora: the LoRA configuration. Its fan-in must be set.
        of_recipe: whether the law belongs to a recipe without full-finetuning runs.
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
    """Return the factor that converts a LoRA learning rate to full finetuning.

    Args:
        law: the scaling law, bound to the optimizer.
        full: the whole weight that trains, with the largest fan-in of the model.
        lora: the configuration that the LoRA learning rate was tuned for. Its fan-in must be
            set.
        dtype: the name of the dtype of the weights during training, such as "bfloat16". ""
            means float32, including float32 master weights.
        of_recipe: whether the law belongs to a recipe without full-finetuning runs.

    Raises:
        LawError: the law does not return a usable multiplier.
    """
    if not is_measured(law, lora, of_recipe=of_recipe):
        return checked_multiplier(law, full, lora)
    # The conversion has two steps: the law leads to rank 16 and alpha 32, where the ratio
    # was measured, and the ratio leads from there to full finetuning.
    middle = replace(FULL_RATIO_AT, fan_in=lora.fan_in)
    ratio = FULL_RATIO / (BFLOAT16 if dtype == "bfloat16" else 1.0)
    return checked_multiplier(law, middle.as_factor(), lora) / ratio


def from_full(
    law: Law, lora: Factor, full: Reference, *, of_recipe: bool = False
) -> float:
    """Return the factor that converts a learning rate of full finetuning to a LoRA matrix.

    The factor is the inverse of the factor that `to_full` returns for float32 weights.

    Raises:
        LawError: the law does not return a usable multiplier.
    """
    middle = replace(FULL_RATIO_AT, fan_in=lora.fan_in)
    if lora.init != "A" or not is_measured(law, middle, of_recipe=of_recipe):
        return checked_multiplier(law, lora, full)
    return FULL_RATIO * checked_multiplier(law, lora, middle)
