"""LoRA by PEFT on a network's layers, or the same layers trained whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from rankaware_optim import initialize
from rankaware_optim.calibration import seeded


def adapt(
    model: nn.Module, rank: int | None, alpha: float, init: str, seed: int, layers: str, saved: Sequence[str] = ()
) -> nn.Module:
    """`model` with LoRA on the modules matching `layers`, of multiplier alpha / rank, drawn by `seed`.

    init="A" is PEFT's own draw. `saved` modules train whole at every rank; rank=None trains the layers' weights.
    """
    import peft

    if rank is None:
        for name, param in model.named_parameters():
            layer, _, kind = name.rpartition(".")
            param.requires_grad_(layer in saved or (kind == "weight" and re.fullmatch(layers, layer) is not None))
        return model
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, modules_to_save=list(saved) or None)
    with seeded(seed):
        adapted: nn.Module = peft.get_peft_model(model, config)
    if init == "B":
        initialize(adapted, "B", seed=seed)
    return adapted
