"""Sweeps of other tools: read them, and fit a recipe to them."""

from ._fit import fit_sweep
from ._runs import DEMO_SWEEP

__all__ = ["DEMO_SWEEP", "fit_sweep"]
