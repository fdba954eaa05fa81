"""The rule by which s follows the rank: s = c·r^(−γ)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .._types import Scaling

# γ of every rule
GAMMA: dict[Scaling, float] = {"fixed": 0.0, "rslora": 0.5, "alpha": 1.0}


def scaling_factor(rule: Scaling, at: float, rank: float) -> float:
    """Return the factor of s for a change of the rank from `at` to `rank`, by a rule of known γ.

    >>> scaling_factor("alpha", 4, 8), scaling_factor("fixed", 4, 8)
    (0.5, 1.0)
    """
    return float((at / rank) ** GAMMA[rule])


def infer_scaling(scalings: Mapping[int, float]) -> Scaling:
    """Return the rule by which the scaling follows the rank, from {rank: scaling};
    "unknown" for one rank.

    >>> infer_scaling({4: 1.0, 64: 1.0}), infer_scaling({4: 4.0, 64: 0.25}), infer_scaling({8: 2.0})
    ('fixed', 'alpha', 'unknown')
    """
    if len(scalings) < 2:
        return "unknown"
    for rule, gamma in GAMMA.items():
        constants = [math.log2(s) + gamma * math.log2(r) for r, s in scalings.items()]
        if max(constants) - min(constants) < 1e-3:
            return rule
    return "unknown"
