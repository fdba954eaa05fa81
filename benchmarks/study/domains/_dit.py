"""A class-conditional diffusion transformer for 28 × 28 images (1.2 million parameters), and its loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEAD, DEPTH, PATCH, SIDE = 128, 32, 4, 7, 28
LAYERS = r".*(modulation|qkv|proj|up|down)$"


class Block(nn.Module):
    """A transformer block: attention and an MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[
            :, None
        ].chunk(6, dim=-1)
        x = x + gate * self._attend(self.norm(x) * (1 + scale) + shift)
        return x + gate2 * self.down(
            F.gelu(self.up(self.norm(x) * (1 + scale2) + shift2))
        )

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


class DiT(nn.Module):
    """The transformer: from images (n, 1, 28, 28), times (n,) and labels (n,) to velocities (n, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.width = width = WIDTH
        self.patch = nn.Linear(PATCH * PATCH, width)
        self.place = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, width) * 0.02)
        self.label = nn.Embedding(10, width)
        self.time = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, PATCH * PATCH)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        condition = F.silu(self.time(_waves(times, self.width)) + self.label(labels))
        x = (
            self.patch(F.unfold(images, PATCH, stride=PATCH).transpose(1, 2))
            + self.place
        )
        for block in self.blocks:
            x = block(x, condition)
        return F.fold(self.out(self.norm(x)).transpose(1, 2), SIDE, PATCH, stride=PATCH)


def _waves(times: Tensor, width: int) -> Tensor:
    """Sines and cosines (n, width) of times (n,) in (0, 1), at frequencies up to 1,000."""
    angles = times[:, None] * torch.exp(
        torch.linspace(0.0, math.log(1000.0), width // 2)
    )
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def flow_loss(
    model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Loss of rectified flow: mean square of v(x_t, t, y) − (noise − x), with x_t = (1 − t)·x + t·noise, t uniform."""
    times = torch.rand(len(images), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    t = times[:, None, None, None]
    return F.mse_loss(
        model((1 - t) * images + t * noise, times, labels), noise - images
    )
