"""Folders of adapters as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def peft_folder(
    path: Path,
    *,
    layers: Sequence[str] = ("q",),
    rank: int = 8,
    fan_in: int = 32,
    others: Sequence[str] = (),
    **config: Any,
) -> Path:
    """Make a folder with these adapted layers and other tensors, add `config` to its configuration,
    and return its path.
    """
    path.mkdir(parents=True, exist_ok=True)
    shapes = dict.fromkeys(others, (2, 2))
    for layer in layers:
        shapes[f"{layer}.lora_A.weight"] = rank, fan_in
        shapes[f"{layer}.lora_B.weight"] = 48, rank
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    saved = {"r": rank, "lora_alpha": 2 * rank, **config}
    (path / "adapter_config.json").write_text(json.dumps(saved))
    return path
