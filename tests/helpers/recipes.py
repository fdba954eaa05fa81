"""Recipes of every kind that can be drawn or printed, and the path of their trials."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from rankaware_optim import Power, Recipe, Reference

VALUES = np.array([0.5, 0.4, math.inf, 0.6, 0.45, 0.7])
TENSORS = {
    "rank": np.array([4, 4, 4, 64, 64, 64]),
    "seed": np.array([0, 1, 0, 0, 1, 0]),
    "lr": np.array([1e-3, 2e-3, 8e-3, 1e-3, 2e-3, 4e-3]),
    "own_lr": np.array([1e-3, 2e-3, 8e-3, 1e-3, 2e-3, 4e-3]),
    "value": VALUES,
}
RECIPE = Recipe(
    name="digits",
    fitted_lr=2e-3,
    reference=Reference(rank=4, alpha=8, fan_in=64),
    law=Power(exponent=0.1),
    covariance=np.diag([0.04, 0.01, 0.09]),
    ceiling=8e-3,
    scaling_rule="fixed",
    full_fan_in=64.0,
    ranks=(4, 64),
    tensors=TENSORS,
)
FULL = np.zeros(6, np.int64)
ONE_RANK = {**TENSORS, "rank": FULL + 4}
KINDS = {
    "two ranks": RECIPE,
    "no ceiling": replace(RECIPE, ceiling=None),
    "full too": replace(
        RECIPE,
        full_seen=True,
        tensors={**TENSORS, "rank": np.array([4, 64, 0, 4, 64, 0])},
    ),
    "one rank": replace(RECIPE, ranks=(4,), scaling_rule="unknown", tensors=ONE_RANK),
    "no rule": replace(RECIPE, scaling_rule="unknown", tensors=ONE_RANK),
    "two ranks, no rule": replace(RECIPE, scaling_rule="unknown"),
    "full alone": replace(
        RECIPE,
        reference=Reference(method="full", fan_in=64),
        ranks=(),
        full_seen=True,
        scaling_rule="unknown",
        tensors={**TENSORS, "rank": FULL},
    ),
    "full and one rank": replace(
        RECIPE,
        ranks=(4,),
        full_seen=True,
        scaling_rule="unknown",
        tensors={**TENSORS, "rank": np.array([4, 0] * 3)},
    ),
    "damaged curves": replace(
        RECIPE,
        tensors={
            **TENSORS,
            "steps": np.array([0, 2, 2, 2, 2, 2]),
            "curve": np.array([[0.9, 0.5]] * 5 + [[math.nan, 0.7]]),
        },
    ),
    "all alike": replace(RECIPE, tensors={**TENSORS, "value": np.ones(6)}),
    "scores below zero": replace(RECIPE, tensors={**TENSORS, "value": -VALUES}),
    "rank 1": replace(
        RECIPE, ranks=(1, 2), tensors={**TENSORS, "rank": np.array([1, 1, 1, 2, 2, 2])}
    ),
    "seven ranks": replace(RECIPE, ranks=(1, 2, 4, 8, 16, 32, 64)),
}


def trials_of(path: Path) -> Path:
    """Return the path of the file with a saved recipe's trials."""
    return path.with_name(f"{path.stem}.trials.safetensors")
