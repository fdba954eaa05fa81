"""Tests that every function with an init= argument rejects values that are not an init."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim.sweeps import fit_sweep

from .helpers.models import mlp

AT = ra.Reference(rank=16, alpha=16)
LORA = [
    {"rank": r, "alpha": r, "fan_in": 64.0, "lr": 2.0**x, "loss": 1 + (x + 11) ** 2}
    for r in (8, 64)
    for x in range(-14, -8)
]


def recipe() -> ra.Recipe:
    return fit_sweep(LORA)


TAKERS = {
    "Reference": lambda init: ra.Reference(rank=4, alpha=4, init=init),
    "Reference, full": lambda init: ra.Reference(method="full", init=init),
    "inspect_model": lambda init: ra.inspect_model(mlp(), init=init),
    "inspect_model, full": lambda init: ra.inspect_model(
        nn.Linear(3, 3), method="full", init=init
    ),
    "initialize": lambda init: ra.initialize(mlp(), init),
    "Convention": lambda init: ra.register_convention(
        ra.Convention("none", "first", "second", init=init)
    ),
    "RankAwareOptimizer": lambda init: ra.RankAwareOptimizer(
        mlp(), "adamw", lr=1e-3, tuned_at=AT, init=init
    ),
    "rank_aware_param_groups": lambda init: ra.rank_aware_param_groups(
        mlp(), lr=1e-3, tuned_at=AT, init=init
    ),
    "Recipe.at": lambda init: recipe().at(rank=8, init=init),
    "Recipe.at, alpha": lambda init: recipe().at(rank=8, alpha=8, init=init),
    "Recipe.at, full": lambda init: recipe().at(method="full", init=init),
    "suggest_lr": lambda init: ra.suggest_lr(mlp(), init=init),
    "suggest_lr, reference": lambda init: ra.suggest_lr(AT, init=init),
}
BAD = ["C", "b", "", False, 0, 1, ["A"], torch.zeros(2)]


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("taker", TAKERS)
def test_an_init_that_cannot_be_is_refused(taker, bad):
    """An impossible init raises an error that names the init and says what to do."""
    with pytest.raises(ra.RankAwareError) as caught:
        TAKERS[taker](bad)
    assert "init" in caught.value.cause
    assert caught.value.cure
