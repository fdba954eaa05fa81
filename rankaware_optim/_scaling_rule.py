"""The rule by which the effective multiplier s follows the rank: s = c·r^(−γ)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

Scaling = Literal["fixed", "rslora", "alpha", "as swept", "unknown"]
SCALINGS: tuple[str, ...] = get_args(Scaling)
# γ of every rule. "as swept" is for a sweep without alpha. It has the middle of the conventions and
# a wider drift.
GAMMA: dict[str, float] = {"fixed": 0.0, "rslora": 0.5, "alpha": 1.0, "as swept": 0.5}


def scaling_factor(rule: str, found: float, rank: float) -> float:
    """Return the factor of s for a change of the rank from `found` to `rank`, by a rule of known γ.

    >>> scaling_factor("alpha", 4, 8), scaling_factor("fixed", 4, 8)
    (0.5, 1.0)
    """
    return float((found / rank) ** GAMMA[rule])


def infer_scaling(seen: Mapping[int, float]) -> Scaling:
    """Return the rule by which the effective multiplier follows the rank, from {rank: scaling};
    "unknown" for one rank.

    >>> infer_scaling({4: 1.0, 64: 1.0}), infer_scaling({4: 4.0, 64: 0.25}), infer_scaling({8: 2.0})
    ('fixed', 'alpha', 'unknown')
    """
    if len(seen) < 2:
        return "unknown"
    for rule, gamma in GAMMA.items():
        constants = [math.log2(s) + gamma * math.log2(r) for r, s in seen.items()]
        if max(constants) - min(constants) < 1e-3:
            return rule  # type: ignore[return-value]
    return "unknown"
