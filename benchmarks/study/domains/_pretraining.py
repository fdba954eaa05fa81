"""Train a network on another task, before its weights are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def trained_on(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    steps: int,
) -> dict[str, Tensor]:
    """The weights after steps of AdamW, one on each batch."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _, batch in zip(range(steps), batches, strict=False):
        opt.zero_grad()
        loss(model, batch).backward()
        opt.step()
    return model.state_dict()
