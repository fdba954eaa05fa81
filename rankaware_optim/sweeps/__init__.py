"""Sweeps of other tools: read them, fit a recipe to them, and score laws on them."""

from ._bench import COMPARED, DEMO_SWEEP, LawScore, Move, bench_law, score_table
from ._fit import fit_sweep

__all__ = ["COMPARED", "DEMO_SWEEP", "LawScore", "Move", "bench_law", "fit_sweep", "score_table"]
