"""Small vision classification: EfficientNet-lite0 learns scikit-learn's digits, as in the demo."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from rankaware_optim.cli._demo import STEPS, digits, evaluate

from . import Domain
from ._batches import drawn
from ._efficientnet import BATCH, RANKS, RATES, build, loss


def batches(seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels, _, _ = digits()
    for chosen in drawn(len(images), batch, seed):
        yield images[chosen], labels[chosen]


DOMAIN = Domain(
    "digits_vision", STEPS, RANKS, build, batches, loss, evaluate, BATCH, RATES
)
