"""Small vision classification: EfficientNet-lite0 learns scikit-learn's digits, as in the demo."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Domain
from ._batches import drawn
from ._efficientnet import BATCH, RANKS, RATES, WIDTHS, build, loss

STEPS, PIXELS = 40, 32


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,400 training and 397 held-out digits as (n, 3, 32, 32) images in about (-1, 1), with
    labels.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=PIXELS, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = ((images - 127) / 128)[order], torch.tensor(data.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def batches(seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels, _, _ = digits()
    for chosen in drawn(len(images), batch, seed):
        yield images[chosen], labels[chosen]


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Return the cross-entropy on the held-out digits, nats."""
    _, _, images, labels = digits()
    return float(F.cross_entropy(model(images), labels))


DOMAIN = Domain(
    "digits_vision", STEPS, RANKS, build, batches, loss, evaluate, BATCH, WIDTHS, RATES
)
