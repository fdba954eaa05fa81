"""EfficientNet-lite0 with ImageNet weights and a new classifier, for the domains that classify images."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded
from rankaware_optim.cli._demo import BATCH, HEAD_RATE, pretrained

from ._adapters import adapt

__all__ = ["BATCH", "RANKS", "RATES", "build", "loss"]

LAYERS = r".*(conv_pw|conv_pwl|conv_head)$"
RANKS, RATES = (4, 16, 64, 256), {"*classifier*": HEAD_RATE}


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    """The network with a new classifier of ten classes, which has a fixed rate; eval mode keeps batch norm frozen."""
    model = copy.deepcopy(pretrained())
    with seeded(seed):
        model.reset_classifier(10)  # type: ignore[operator]
    return adapt(model, rank, alpha, init, seed, LAYERS, saved=["classifier"]).eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)
