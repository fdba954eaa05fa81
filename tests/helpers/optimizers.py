"""What tests of several packages know of optimizers: Muon, which torch has from 2.9 on, and a moved rate's distance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankaware_optim import Falling, Law

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
