"""Draw the examples of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def drawn(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of `size` indices below `count`, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(count, (size,), generator=generator)
