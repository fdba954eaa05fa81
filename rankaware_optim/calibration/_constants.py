"""The constants of a calibration. The end of each comment is its evidence: a page of
benchmarks/results, or "by hand".
"""

from __future__ import annotations

# Runs of a search at each of its ranks, where neither trials nor a budget is given: simulated.md
TRIALS_PER_RANK = 8
SEEDS = (0, 1)  # of the trials, in turn: by hand
