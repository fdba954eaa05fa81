"""What tests of several packages know of optimizers: Muon, which torch has from 2.9 on, and the default law's rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from rankaware_optim import Falling, Law, Reference
from rankaware_optim._types import Factor

DISTANCE = 0.9  # what a rate that the default law moves is multiplied by

Muon: Any = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="torch has Muon from 2.9 on")


def muon(*values: Any, kind: Any = Muon) -> Any:
    """A row of a table of optimizers, which has the class first, or its name."""
    return pytest.param(kind, *values, marks=needs_muon)


def used(law: Law, multiplier: float) -> float:
    """A law's multiplier as a rate is trained with it: the default law keeps a distance where it moves a rate."""
    return (
        multiplier * DISTANCE
        if isinstance(law, Falling) and multiplier != 1.0
        else multiplier
    )


def multiplier(
    rank: int | None,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    settings: Mapping[str, Any] | None = None,
    width: int = 16,
) -> float:
    """What moves a rate of rank and alpha 16 to a factor of this rank; one for other parameters, whose rank is None."""
    if rank is None:
        return 1.0
    factor = Factor("by hand", "A", rank, width, width)
    law = Falling().bind(kind, settings or {})
    at_16 = Reference(rank=16, alpha=16, fan_in=width)
    return used(law, law.multiplier(factor, at_16))
