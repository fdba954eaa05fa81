"""The benchmarks' tasks, one file each: a frozen network, LoRA on its layers, batches, a loss, a held-out score.

To add one, write `domains/<name>.py` with a `DOMAIN`; nothing else needs to name it. Files with a leading underscore
are what tasks share. `vision_classification.py` is the example.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from rankaware_optim.errors import RankAwareError


class DomainError(RankAwareError):
    """An unknown domain, or one whose weights or data cannot be had."""


@dataclass(frozen=True)
class Domain:
    """A task.

    build(rank, alpha, init, seed): the model, frozen but for LoRA pairs of multiplier alpha / rank at Init[A] or
    Init[B], or with rank=None the same layers trained whole. batches(seed, batch): endless batches of so many
    examples. loss(model, batch): the training loss. evaluate(model): the held-out loss, on the same examples and noise
    every time. head_rates: the fixed rates, by name pattern, of what is trained beside the adapters. ranks: those that
    the width allows. large: a run takes more than a minute, so that the study sweeps a smaller grid. batch: examples a
    step, which recipes record. score: the unit of the held-out loss, and what its fall is of.
    """

    name: str
    steps: int
    ranks: tuple[int, ...]
    build: Callable[[int | None, float, str, int], nn.Module]
    batches: Callable[[int, int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], float]
    batch: int
    head_rates: Mapping[str, float] = field(default_factory=dict)
    large: bool = False
    score: str = "nats"

    @property
    def ranks_swept(self) -> tuple[int, ...]:
        return (1, *self.ranks)

    def warm(self) -> None:
        """Fetch, pretrain and read all that a run needs: once, before any process or clock starts."""
        self.evaluate(self.build(4, 4.0, "A", 0))
        next(self.batches(0, self.batch))


STUDY = (  # its domains, those first that say most for their cost
    "image_generation",
    "vision_classification",
    "language",
    "reinforcement",
    "vision_language",
    "text_classification",
    "language_smollm2",
)


def weights_hash(domain: Domain) -> str:
    """sha256 of the network before training, of seed 0, in 16 digits."""
    digest = hashlib.sha256()
    for name, tensor in domain.build(None, 1.0, "A", 0).state_dict().items():
        digest.update(name.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def names() -> list[str]:
    """Every domain there is, in the study's order."""
    found = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [*(name for name in STUDY if name in found), *(name for name in found if name not in STUDY)]


def get_domain(name: str) -> Domain:
    """A domain by its file's name."""
    if name not in names():
        raise DomainError(f"There is no domain {name!r}.", f"Known are {', '.join(names())}.")
    found: Domain = import_module(f"{__name__}.{name}").DOMAIN
    return found
