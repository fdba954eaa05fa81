"""Put PEFT's LoRA on a network's layers, or make the weights of the same layers trainable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from rankaware_optim import initialize
from rankaware_optim.calibration import seeded


def adapt(
    model: nn.Module,
    rank: int | None,
    alpha: float,
    init: str,
    seed: int,
    layers: str,
    saved: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """`model` with LoRA on some layers; with rank None, with the weights of these layers trainable.

    Args:
        model: a frozen network.
        rank: the rank; None for full finetuning.
        alpha: the multiplier of a pair is alpha / rank.
        init: "A" is PEFT's own draw, "B" is Init[B].
        seed: seed of the draw.
        layers: regular expression that matches the names of the layers.
        saved: names of modules that are trained in full at every rank.
        options: further options of `peft.LoraConfig`.
    """
    import peft

    if rank is None:
        for name, param in model.named_parameters():
            layer, _, kind = name.rpartition(".")
            param.requires_grad_(
                layer in saved
                or (kind == "weight" and re.fullmatch(layers, layer) is not None)
            )
        return model
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=layers,
        modules_to_save=list(saved) or None,
        **options,
    )
    with seeded(seed):
        adapted: nn.Module = peft.get_peft_model(model, config)
    if init == "B":
        initialize(adapted, "B", seed=seed)
    return adapted
