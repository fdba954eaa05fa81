"""The line search: the rate that it finds, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from frontier import line_search
from frontier.line_search import ONE, TWO, searched
from study.domains import Domain
from study.grids import FULL
from torch import Tensor, nn

FAR = 0.25  # how far the best weight is from the first one


class Product(nn.Module):
    """A weight as b·a, with a = 1 and b = 0; without factors the weight itself; and a head."""

    def __init__(self, factors: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1), requires_grad=factors)
        self.b = nn.Parameter(torch.zeros(1))
        self.head = nn.Parameter(torch.zeros(1))


def built(rank: int | None, alpha: float, init: str, seed: int) -> Product:
    return Product(factors=rank is not None)


def batches(seed: int, batch: int) -> Iterator[Tensor]:
    while True:
        yield torch.full((batch,), FAR)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    assert isinstance(model, Product)
    return ((model.b * model.a + 100 * model.head - batch) ** 2).mean()


TOY = Domain(
    "toy",
    1,
    (4,),
    built,
    batches,
    loss,
    lambda model: 0.0,
    4,
    (1.0, 1.0),
    {"head": 1e-3},
)


@pytest.mark.parametrize(
    ("rank", "way", "best"),
    [(FULL, ONE, 0.25), (4, ONE, 0.25), (4, TWO, 0.207)],  # t = 1/4; t·(1 + t) = 1/4
)
def test_the_rate_found_reaches_the_best_weight(
    rank: int, way: str, best: float
) -> None:
    """The search finds the step to the lowest loss to half an octave, along one factor or both, with heads still."""
    found = searched(TOY, "Init[A], s = 1", rank, 0, way)
    assert abs(found - torch.tensor(best).log2().item()) < 0.5


@pytest.mark.parametrize("way", [ONE, TWO])
def test_a_search_leaves_the_weights(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a search the weights are what they were."""
    model = Product(factors=True)
    monkeypatch.setattr(line_search, "built", lambda *asked: model)
    searched(TOY, "Init[A], s = 1", 4, 0, way)
    assert [p.item() for p in model.parameters()] == [1.0, 0.0, 0.0]
