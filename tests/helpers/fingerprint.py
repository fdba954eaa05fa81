"""All that a model is, to the bit, as plain values that compare."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Which objects its modules hold, their values and gradients, modes, hooks, configurations; the global RNG; whether
    gradients are computed.
    """
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[f"{name} itself"] = id(module)
        for key, value in vars(module).items():
            seen[f"{name}.{key}"] = contents(value)
    seen["random"] = (
        bits(torch.get_rng_state()),
        random.getstate(),
        contents(np.random.get_state()),
    )
    seen["grad mode"] = torch.is_grad_enabled()
    return seen


def contents(value: Any, depth: int = 3) -> Any:
    """A value with the identity of what can be shared, and the bits of tensors and their gradients."""
    if isinstance(value, torch.Tensor):
        grad = None if value.grad is None else (id(value.grad), bits(value.grad))
        hooks = len(getattr(value, "_backward_hooks", None) or ())
        return (
            id(value),
            bits(value),
            value.requires_grad,
            grad,
            hooks,
            tuple(vars(value)),
        )
    if isinstance(value, Mapping) and depth:
        return id(value), [
            (key, contents(inner, depth - 1)) for key, inner in value.items()
        ]
    if isinstance(value, (list, tuple, set)) and depth:
        return type(value), [contents(inner, depth - 1) for inner in value]
    if hasattr(value, "init_lora_weights"):
        return id(value), contents(vars(value), depth - 1)
    if isinstance(value, (int, float, str, bytes, bool, type(None))):
        return value
    return repr(value) if isinstance(value, np.ndarray) else id(value)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor's dtype, shape and bytes, of NaN and minus zero too."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b"",
    )


def changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, by name."""
    return [
        key
        for key in {**first, **second}
        if key not in first or key not in second or first[key] != second[key]
    ]
