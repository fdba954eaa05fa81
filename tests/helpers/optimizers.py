"""Optimizers for tests: classes under the names of real ones, rows for Muon, and learning rates by
the default law.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, Signature
from typing import Any

import pytest
import torch

from rankaware_optim import Falling, Reference
from rankaware_optim._types import Factor

Muon: Any = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="torch has Muon from 2.9 on")


def muon(*values: Any, kind: Any = Muon) -> Any:
    """Return a row of a test table that begins with Muon or another class, and that is skipped if
    torch has no Muon.
    """
    return pytest.param(kind, *values, marks=needs_muon)


class Moves(torch.optim.Optimizer):
    """An optimizer that moves every entry by its group's learning rate, and keeps no state."""

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data -= float(group["lr"])


def called(name: str, package: str = "somewhere") -> type[torch.optim.Optimizer]:
    """Return an optimizer class under the name of a real one, by which laws know its family."""
    return type(name, (Moves,), {"__module__": f"{package}.optimizer"})


def with_defaults(
    name: str, package: str, **defaults: Any
) -> type[torch.optim.Optimizer]:
    """Return an optimizer class under the name of a real one, whose signature has these defaults."""
    parameters = [
        Parameter(key, Parameter.KEYWORD_ONLY, default=value)
        for key, value in {"lr": 1e-3, **defaults}.items()
    ]
    kind: Any = called(name, package)
    params = Parameter("params", Parameter.POSITIONAL_OR_KEYWORD)
    kind.__signature__ = Signature([params, *parameters])
    return kind


def names_of(opt: Any) -> list[list[str]]:
    """Return the names of the parameters in every part of the groups."""
    return [list(group.names) for group in opt.rates.groups]


def rates_of(opt: Any) -> dict[str, float]:
    """Return the learning rate at which every parameter trains, by name."""
    return {name: group.lr for name, group in opt.rates.items()}


def multiplier(
    rank: int | None,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    settings: Mapping[str, Any] | None = None,
    width: int = 16,
) -> float:
    """Return the multiplier of a LoRA matrix of this rank and scaling 1, for a learning rate tuned
    at rank 16 and alpha 16, or 1 if the rank is None.
    """
    if rank is None:
        return 1.0
    factor = Factor("by hand", "A", rank, width, width)
    law = Falling().bind(kind, settings or {})
    at_16 = Reference(rank=16, alpha=16, fan_in=width)
    return law.multiplier(factor, at_16)


def groups_by_hand(
    model: Any, lr: float, kind: Any = torch.optim.AdamW
) -> list[dict[str, Any]]:
    """Return the groups of `mlp((4, 8))` as a person writes them, in the order in which gradient
    norms are added up.
    """
    groups = []
    for layer, rank in ((model.layer0, 4), (model.layer1, 8)):
        rate = lr * multiplier(rank, kind)
        groups += [{"params": [p], "lr": rate} for p in (layer.lora_A, layer.lora_B)]
    return [*groups, {"params": list(model.head.parameters())}]
