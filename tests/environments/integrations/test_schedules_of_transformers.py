"""transformers' schedules keep the ratios between groups."""

from __future__ import annotations

import pytest
import torch

from rankaware_optim import RankAwareOptimizer, Reference
from rankaware_optim.optimizer import check_scheduler

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
def test_get_scheduler_keeps_the_ratios(name):
    """Every schedule of transformers.get_scheduler moves all groups by one factor, as on native groups."""
    model = mlp((4, 8, 16))
    opt = RankAwareOptimizer(model, torch.optim.SGD, lr=0.5, tuned_at=Reference(rank=16, alpha=16))
    native = torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in opt.param_groups], lr=0.5)
    multipliers = [g["lr_multiplier"] for g in opt.param_groups]
    pair = []
    for optimizer in (opt, native):
        warmup = {} if name in ("constant", "reduce_lr_on_plateau", "greedy") else {"num_warmup_steps": 2}
        made = transformers.get_scheduler(
            name, optimizer, num_training_steps=10, scheduler_specific_kwargs=EXTRA.get(name), **warmup
        )
        pair.append((optimizer, made))
    assert check_scheduler(opt, pair[0][1]) == ()
    for _ in range(8):
        for optimizer, scheduler in pair:
            optimizer.step()
            scheduler.step(*([1.0] if name in ("reduce_lr_on_plateau", "greedy") else []))
        rates = [g["lr"] for g in opt.param_groups]
        assert rates == [g["lr"] for g in native.param_groups]
        assert [r / m for r, m in zip(rates, multipliers, strict=True)] == pytest.approx([rates[0]] * len(rates))
