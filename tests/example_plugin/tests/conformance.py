"""The installed example package: its law and its convention are found by name and are sound."""

from __future__ import annotations

import torch
from rankaware_example import BOTTLENECK, Bottleneck, StableProduct

from rankaware_optim import RankAwareOptimizer, Reference
from rankaware_optim.laws import get_law
from rankaware_optim.testing import check_convention, check_law


def test_the_law_is_sound() -> None:
    """The law passes check_law and is found under the name of its entry point."""
    check_law("example-product")
    assert get_law("example-product") == StableProduct()


def test_the_convention_is_sound() -> None:
    """The layer is read with the right rank, scaling, fan-in and roles."""
    error = check_convention(
        lambda r, alpha: Bottleneck(12, 20, r, alpha),
        torch.ones(3, 12),
        convention=BOTTLENECK,
    )
    assert error is not None


def test_both_are_used() -> None:
    """An optimizer on the layer finds the law by name: at four times the rank and the same scaling,
    it halves the learning rate.
    """
    model = Bottleneck(12, 20, 8, 8.0)
    at = Reference(rank=2, alpha=2)
    optimizer = RankAwareOptimizer(
        model, torch.optim.AdamW, lr=1e-3, law="example-product", tuned_at=at
    )
    assert {round(part.lr, 9) for part in optimizer.rates.groups} == {5e-4}
