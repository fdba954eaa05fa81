"""Muon, which torch has from 2.9 on; the package supports older ones too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

Muon: Any = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="torch has Muon from 2.9 on")


def muon(*values: Any, kind: Any = Muon) -> Any:
    """A row of a table of optimizers, which has the class first, or its name."""
    return pytest.param(kind, *values, marks=needs_muon)
