"""transformers' schedules set base rates, and every group trains at its multiple of them."""

from __future__ import annotations

import pytest
import torch

from rankaware_optim import RankAwareOptimizer, Reference
from rankaware_optim.optimizer import effective_lr

from ...helpers.models import mlp

transformers = pytest.importorskip("transformers")

NAMES = [str(kind.value) for kind in transformers.SchedulerType]
EXTRA = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
    "reduce_lr_on_plateau": {"patience": 0},
}


@pytest.mark.parametrize("name", NAMES)
def test_get_scheduler_sets_the_base_rate(name):
    """Every schedule of transformers.get_scheduler gives ours the base rate that it gives one plain group."""
    model, warmup = mlp((4, 8, 16)), {}
    opt = RankAwareOptimizer(
        model, torch.optim.SGD, lr=0.5, tuned_at=Reference(rank=16, alpha=16)
    )
    plain = torch.optim.SGD(mlp((4,)).parameters(), lr=0.5)
    if name not in ("constant", "reduce_lr_on_plateau", "greedy"):
        warmup = {"num_warmup_steps": 2}
    ours, other = (
        transformers.get_scheduler(
            name,
            optimizer,
            num_training_steps=10,
            scheduler_specific_kwargs=EXTRA.get(name),
            **warmup,
        )
        for optimizer in (opt, plain)
    )
    for _ in range(8):
        for optimizer, scheduler in ((opt, ours), (plain, other)):
            optimizer.step()
            scheduler.step(
                *([1.0] if name in ("reduce_lr_on_plateau", "greedy") else [])
            )
        base = plain.param_groups[0]["lr"]
        assert {group["lr"] for group in opt.param_groups} == {base}
        assert [effective_lr(g) for g in opt.param_groups] == [
            base * g["rank_multiplier"] for g in opt.param_groups
        ]
