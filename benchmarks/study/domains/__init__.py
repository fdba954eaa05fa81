"""The benchmarks' tasks, one file each: a frozen network, LoRA on its layers, batches, a loss, a held-out score.

To add one, write `domains/<name>.py` with a `DOMAIN`. No other file needs a change. Files with a leading underscore
hold what tasks share. `vision_classification.py` is the example.
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
    """A domain is unknown, or its weights, data or stored runs cannot be used."""


@dataclass(frozen=True)
class Domain:
    """A task.

    Args:
        name: the name of its file.
        steps: optimizer steps of a run.
        ranks: the ranks to sweep besides 1, as far as the width allows.
        build: (rank, alpha, init, seed) -> the model, frozen except for LoRA pairs of multiplier alpha / rank at
            Init[A] or Init[B]. With rank None the weights of the same layers are trained instead.
        batches: (seed, batch size) -> endless batches.
        loss: (model, batch) -> the training loss, a scalar tensor.
        evaluate: (model) -> the held-out loss, on the same examples and noise every time.
        batch: examples a step. Recipes record it.
        widths: the mean fan-in of the adapted layers, weighted by size, and the largest: `Survey.width` and
            `Survey.full_width("A")`. Laws move rates by them, so that tables need no network.
        head_rates: fixed rates, by name pattern, of parameters that are trained beside the adapters.
        large: a run takes more than a minute, so that the study sweeps a smaller grid.
        score: the unit of the held-out loss, and what its fall measures.
    """

    name: str
    steps: int
    ranks: tuple[int, ...]
    build: Callable[[int | None, float, str, int], nn.Module]
    batches: Callable[[int, int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], float]
    batch: int
    widths: tuple[float, float]
    head_rates: Mapping[str, float] = field(default_factory=dict)
    large: bool = False
    score: str = "nats"

    @property
    def ranks_swept(self) -> tuple[int, ...]:
        return (1, *self.ranks)

    def warm(self) -> None:
        """Fetch, pretrain and read all that a run needs, once, before any process or clock starts."""
        self.evaluate(self.build(4, 4.0, "A", 0))
        next(self.batches(0, self.batch))


STUDY = (  # the study's domains; those that show most for their cost come first
    "image_generation",
    "vision_classification",
    "language",
    "reinforcement",
    "vision_language",
    "text_classification",
    "language_smollm2",
)
# run when every rule and default had been chosen: no choice may rest on them
HELD_OUT = ("audio", "time_series")


def weights_hash(domain: Domain) -> str:
    """First 16 digits of the sha256 of the network before training, built with seed 0."""
    digest = hashlib.sha256()
    for name, tensor in domain.build(None, 1.0, "A", 0).state_dict().items():
        digest.update(
            name.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def names() -> list[str]:
    """The names of all domains, the study's first and in its order."""
    found = sorted(
        m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")
    )
    return [
        *(name for name in STUDY if name in found),
        *(name for name in found if name not in STUDY),
    ]


def get_domain(name: str) -> Domain:
    """A domain by its file's name."""
    if name not in names():
        raise DomainError(
            f"There is no domain {name!r}.", f"Known domains: {', '.join(names())}."
        )
    found: Domain = import_module(f"{__name__}.{name}").DOMAIN
    return found
