"""Image generation: a diffusion transformer that knows the digits 0 to 4 learns 5 to 9, by rectified flow.

The transformer is pretrained on its first use, with a fixed seed (about a minute), and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from . import Domain
from ._adapters import adapt
from ._assets import made_once
from ._batches import drawn
from ._dit import LAYERS, DiT, flow_loss
from ._mnist import digits
from ._pretraining import trained_on

BATCH, HELD_OUT, PRETRAINING = 32, 512, 1500


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    generator: torch.Generator


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    model = DiT()
    model.load_state_dict(made_once("dit-digits-0-4-v1", _pretrain))
    return adapt(model.requires_grad_(False), rank, alpha, init, seed, LAYERS)


def batches(seed: int, batch: int, new: bool = True) -> Iterator[Batch]:
    images, labels = digits(new)
    generator = torch.Generator().manual_seed(seed)
    for chosen in drawn(len(images) - HELD_OUT, batch, seed):
        yield Batch(images[chosen], labels[chosen], generator)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return flow_loss(model, *batch)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    images, labels = digits(True)
    return float(
        flow_loss(
            model,
            images[-HELD_OUT:],
            labels[-HELD_OUT:],
            torch.Generator().manual_seed(1),
        )
    )


def _pretrain() -> dict[str, Tensor]:
    """The transformer's weights after steps of AdamW on the digits 0 to 4."""
    with seeded(0):
        model = DiT()
    return trained_on(model, batches(0, BATCH, new=False), loss, PRETRAINING)


DOMAIN = Domain(
    "image_generation",
    100,
    (4, 16, 64, 128),
    build,
    batches,
    loss,
    evaluate,
    BATCH,
    (640 / 3, 512.0),
    score="squared error of the velocity",
)
