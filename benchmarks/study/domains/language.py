"""Language: a small Llama that has read the Brown corpus learns to write Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import Domain
from ._adapters import adapt
from ._llama import (
    LAYERS,
    VOCABULARY,
    WIDTHS,
    llama,
    token_loss,
    tokens,
    windows,
)

BATCH, STEPS, HELD_OUT = 8, 100, 64
SCORE = f"nats a token; before training worse than a uniform guess, {math.log(VOCABULARY):.2f}"


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    return adapt(llama(), rank, alpha, init, seed, LAYERS)


def batches(seed: int, batch: int) -> Iterator[Tensor]:
    written = tokens("code")
    yield from windows(written[: len(written) * 9 // 10], batch, seed)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Mean loss of 64 windows from the last tenth of the code, nats a token."""
    written = tokens("code")
    return float(
        token_loss(model, next(windows(written[len(written) * 9 // 10 :], HELD_OUT, 1)))
    )


DOMAIN = Domain(
    "language",
    STEPS,
    (4, 16, 64, 192),
    build,
    batches,
    token_loss,
    evaluate,
    BATCH,
    WIDTHS,
    score=SCORE,
)
