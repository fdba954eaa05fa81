"""A user's file that only a type checker reads (`mypy tests/typing/user.py`) and nothing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim.optimizer import RateGroup, Report


def of_torch(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a scheduler for any torch optimizer."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 10)


def train(model: nn.Module, built: torch.optim.SGD, trial: ra.Trial) -> None:
    """Use optimizers of each form in the ways in which users do."""
    at = ra.Reference(rank=16, alpha=32)
    opt = ra.RankAwareOptimizer(
        model, torch.optim.AdamW, lr=2e-4, tuned_at=at, weight_decay=0.01
    )
    assert_type(opt, ra.RankAwareOptimizer)
    assert_type(opt.report(), Report)
    assert_type(opt.step(lambda: 0.5), float)
    assert_type(opt.param_groups, list[dict[str, Any]])
    assert_type(opt.state_dict(), dict[str, Any])
    assert_type(opt.rates["q.lora_A"], RateGroup)
    assert_type(opt.rates.groups, tuple[RateGroup, ...])
    assert_type(opt.rates.groups[0].lr, float)
    of_torch(opt).step()
    opt.zero_grad()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.add_param_group({"params": list(model.parameters())})
    assert_type(ra.RankAwareOptimizer(built, model=model), ra.RankAwareOptimizer)
    assert_type(
        ra.RankAwareOptimizer(model.parameters(), "adamw", model=model, lr=1e-3),
        ra.RankAwareOptimizer,
    )
    assert_type(trial.optimizer(model, weight_decay=0.01), ra.RankAwareOptimizer)
    ra.RankAwareOptimizer(model, "adamw", lr=1e-3, tuned_at="r=16,alpha=32")
    ra.RankAwareOptimizer(model, "adamw", lr=1e-3, tuned_at=Path("adapter"))


def mistakes(model: nn.Module) -> None:
    """Make mistakes that a type checker finds. Under `strict`, mypy also reports an ignore comment
    that is not needed.
    """
    opt = ra.RankAwareOptimizer(model, torch.optim.AdamW, lr="2e-4")  # type: ignore[arg-type]
    ra.RankAwareOptimizer(model, torch.optim.AdamW, method="adapters")  # type: ignore[arg-type]
    opt.reports()  # type: ignore[attr-defined]
    opt.rates["q.lora_A"] = 1.0  # type: ignore[index]
    of_torch(model)  # type: ignore[arg-type]
