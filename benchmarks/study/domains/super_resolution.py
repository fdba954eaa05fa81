"""Super-resolution: a convolutional U-Net that removes noise from the digits 0 to 4 learns to sharpen 5 to 9.

LoRA is on 3 × 3 convolutions. The network is pretrained on its first use, with a fixed seed (under a minute), and kept
in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from . import Domain
from ._adapters import adapt
from ._assets import made_once
from ._batches import drawn
from ._mnist import digits
from ._pretraining import trained_on

WIDTH, BATCH, HELD_OUT, PRETRAINING, NOISE, SMALLER = 16, 16, 512, 600, 0.5, 4
LAYERS = r"(down|middle|up)\.\d+\.conv$"
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A 3 × 3 convolution of the normed and activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, inputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.silu(self.norm(x)))
        return out


class UNet(nn.Module):
    """From bad pictures (n, 1, 28, 28) to better ones (130,000 parameters)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList(
            [Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
        )
        self.middle = nn.ModuleList(
            [Block(4 * width, 4 * width), Block(4 * width, 4 * width)]
        )
        self.up = nn.ModuleList([Block(6 * width, 2 * width), Block(3 * width, width)])
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        skipped = [self.enter(pictures)]
        for block in self.down:
            skipped.append(block(skipped[-1]))
        x = skipped.pop()
        for block in self.middle:
            x = x + block(x)
        for block in self.up:
            x = block(
                torch.cat([F.interpolate(x, scale_factor=2.0), skipped.pop()], dim=1)
            )
        better: Tensor = pictures + self.leave(F.silu(x))
        return better


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    model = UNet()
    model.load_state_dict(made_once("unet-digits-0-4-v1", _pretrained))
    return adapt(model.requires_grad_(False), rank, alpha, init, seed, LAYERS)


def batches(seed: int, batch: int) -> Iterator[Batch]:
    images, _ = digits(True)
    for chosen in drawn(len(images) - HELD_OUT, batch, seed):
        yield blurred(images[chosen]), images[chosen]


def blurred(images: Tensor) -> Tensor:
    """The images after a quarter of their size."""
    return F.interpolate(
        F.avg_pool2d(images, SMALLER), scale_factor=float(SMALLER), mode="bilinear"
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    bad, good = batch
    return F.mse_loss(model(bad), good)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    images, _ = digits(True)
    return float(loss(model, (blurred(images[-HELD_OUT:]), images[-HELD_OUT:])))


def _pretrained() -> dict[str, Tensor]:
    """The network's weights after 600 steps of AdamW at 1e-3 that remove Gaussian noise from the digits 0 to 4."""
    with seeded(0):
        model = UNet()
    return trained_on(model, _noisy(), loss, PRETRAINING)


def _noisy() -> Iterator[Batch]:
    """Digits 0 to 4 with noise, and without."""
    images, _ = digits(False)
    noise = torch.Generator().manual_seed(0)
    for chosen in drawn(len(images), BATCH, 0):
        added = NOISE * torch.randn(BATCH, 1, 28, 28, generator=noise)
        yield images[chosen] + added, images[chosen]


DOMAIN = Domain(
    "super_resolution",
    60,
    (4, 16, 64),
    build,
    batches,
    loss,
    evaluate,
    BATCH,
    (10896 / 19, 864.0),
    score="squared error",
)
