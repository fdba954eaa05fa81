"""The constants of a recipe's rates. The end of each comment is its evidence: a page of
benchmarks/results, or "by hand".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Z90 = 1.645  # standard deviations to the end of a 90 % band: its meaning
# What is added outside the data: standard deviations, octaves of rate per octave of rank, of width
# and of batch, and octaves from one init to the other. They are rules of thumb from the spread of
# published sweeps about the law, for the batch from small sweeps (.3 to .67): by hand
RANK_SD = 0.1
WIDTH_SD = 0.25
BATCH_SD = 0.15
INIT_SD = 1.0
# RANK_SD for a rank below those tried at A = 0, where best rates fall less with rank than the
# trials say: frozen answers
LOWER_RANK_SD = 0.2
# Octaves, by init: standard deviation of the best rate that another task gives: another_task.md,
# frozen answers
ANOTHER_TASK_SD = {"A": 1.3, "B": 2.4}
# A width that differs by more than this factor is another model's, where even a band with that
# spread missed a third of the best rates with steps and batch given: suggestion.md
SAME_WIDTH = 2.0
# Share of a drift at B = 0, continued to r = n, by which the band of full finetuning is widened: by
# hand
DRIFT_SHARE = 0.5
# Octaves. Larger margins lost no less: frozen answers
MOST_MARGIN = 0.25
# The width where none is known, which nearly cancels between ranks of one init: by hand
ANY_WIDTH = 4096.0
SAME = 1e-6  # relative tolerance of settings, about float32's precision
# In a table of rates by name: the parameter had each trial's base rate
BASE: Literal["base"] = "base"
TableOfRates = Mapping[str, float | Literal["base"]]
