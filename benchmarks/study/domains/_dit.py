"""A class-conditional diffusion transformer of 1.2 million parameters, for 28 × 28 images, and its flow loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, PATCH, SIDE = 128, 4, 4, 7, 28
LAYERS = r".*(modulation|qkv|proj|up|down)$"


class Block(nn.Module):
    """Attention and a two-layer network, each shifted, scaled and gated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate * self._attend(self.norm(x) * (1 + scale) + shift)
        return x + gate2 * self.down(F.gelu(self.up(self.norm(x) * (1 + scale2) + shift2)))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """Images (n, 1, 28, 28), times (n,) and labels (n,) to velocities of the images' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH) * 0.02)
        self.label = nn.Embedding(10, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        condition = F.silu(self.time(_waves(times)) + self.label(labels))
        x = self.patch(F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)) + self.place
        for block in self.blocks:
            x = block(x, condition)
        return F.fold(self.out(self.norm(x)).transpose(1, 2), SIDE, PATCH, stride=PATCH)


def _waves(times: Tensor) -> Tensor:
    """Sines and cosines of times in (0, 1), at frequencies up to 1,000."""
    angles = times[:, None] * torch.exp(torch.linspace(0.0, math.log(1000.0), WIDTH // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Rectified flow: mean square of v(x_t, t, y) − (noise − x), x_t = (1 − t)·x + t·noise, t uniform."""
    times = torch.rand(len(images), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    t = times[:, None, None, None]
    return F.mse_loss(model((1 - t) * images + t * noise, times, labels), noise - images)
