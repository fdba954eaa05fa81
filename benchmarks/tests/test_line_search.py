"""The line search on the study's tasks: what moves, and the ways of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from frontier import line_search
from frontier.line_search import searched
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


@pytest.mark.parametrize("rank", [FULL, 4])
def test_a_search_moves_what_trains_at_the_base_rate(rank: int) -> None:
    """The search finds the octave of the best step with heads still; a head's step would be a hundred times larger."""
    assert searched(TOY, "Init[A], s = 1", rank, 0) == -2


def test_half_way_is_the_geometric_mean() -> None:
    """Half way lies in the middle of two log2 rates on file."""
    cell = ("language", "Init[A], s = 1", 16)
    both = line_search.suggestion(cell, 0) + line_search.search_alone(cell, 0)
    assert line_search.half_way(cell, 0) == both / 2
