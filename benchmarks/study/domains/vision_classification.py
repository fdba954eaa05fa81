"""Vision classification: EfficientNet-lite0 with ImageNet weights learns MNIST's digits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Domain
from ._batches import drawn
from ._efficientnet import BATCH, RANKS, RATES, WIDTHS, build, loss
from ._mnist import mnist

STEPS, PIXELS, HELD_OUT = 60, 32, 512


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """Images (10000, 3, 32, 32), scaled as in the network's training: (x − 127) / 128; and labels (10000,)."""
    images, labels = mnist()
    larger = F.interpolate(
        (images + 1) * 127.5, size=(PIXELS, PIXELS), mode="bilinear", antialias=True
    )
    return ((larger - 127) / 128).expand(-1, 3, -1, -1), labels


def batches(seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = pictures()
    for chosen in drawn(len(images) - HELD_OUT, batch, seed):
        yield images[chosen], labels[chosen]


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    images, labels = pictures()
    return float(loss(model, (images[-HELD_OUT:], labels[-HELD_OUT:])))


DOMAIN = Domain(
    "vision_classification",
    STEPS,
    RANKS,
    build,
    batches,
    loss,
    evaluate,
    BATCH,
    WIDTHS,
    RATES,
)
