"""The constants of the fit. (`calibration/_constants.py` has those of the search.)

Each comment ends with the evidence for the number: a page of benchmarks/results, a question of
benchmarks/answers.md, or "judgement" if it was chosen without a measurement.
"""

from __future__ import annotations

import numpy as np

# --- curves and runs ------------------------------------------------------------------------------

TAIL = 5  # a run is scored by the mean of this many values at least: judgement
EARLY = 0.3  # a run is not judged before this share of its steps: judgement
# A mean of TAIL values counts as higher than another if it is this many standard deviations of a
# single value above it: judgement
CLEAR = 1.5
ROSE = 2.0  # the same for the end of a curve above its beginning: judgement
# A run diverged if it ended this share of the best gain above its start: judgement
DIVERGED = 0.25

# --- the loss model -------------------------------------------------------------------------------

# The grid of shapes (see `_loss_model`): σ in units of the gain; h in octaves, from a corner to a
# parabola; a per octave, from a parabola to a cliff; k in units of the gain: judgement
NOISE = np.geomspace(0.002, 0.5, 6)
SHOULDERS = np.array([0.4, 1.0, 4.0])
STEEPNESS = np.array([0.0, 1.5, 3.0, 4.5])
CURVATURE = np.geomspace(0.005, 2.0, 10)
USUAL_NOISE = 0.015  # median of the prior of σ: judgement
NOISE_SD = 1.2  # standard deviation of log σ in its prior: judgement
# How far a rank's own log σ, log h, a and log k are from the shared ones, as standard deviations:
# judgement
OF_RANK_SDS = (0.5, 0.7, 1.0, 0.7)
SEED_SD = 3.0  # standard deviation of a seed's level, in units of σ: judgement
# This share of σ² is smooth in the learning rate. Without it, two of 210 calibrations had a
# learning rate above one that diverged: benchmarks/answers.md
SMOOTH = 0.5
SHAPE_ERROR = 0.2  # error of the shape, as a share of the gap to the best: judgement
LENGTH = 1.0  # correlation length of the smooth noise, octaves: judgement
GRID = 0.125  # octaves between candidate optima: judgement
BEYOND = 3.0  # octaves from the learning rates tried to the last candidate: judgement
# Units of the gain: standard deviation of how far the best possible loss is below the best trial's,
# in a fitted curve: judgement
BELOW_BEST = 0.1
# A curve estimates nothing if it misses a trial with a gap below GOOD by more than MOST_MISSED, in
# units of the gain. Of such trials of the study's recipes 95 % are within 0.03: judgement
GOOD = 0.3
MOST_MISSED = 0.06
# An estimated loss is reported if its 90 % interval is at most this wide, in units of the gain:
# judgement. `_curve` has how good such estimates are
KNOWN = 0.5
# Gap between an untrained run and the best one, in units of the gain: 1 by definition
UNTRAINED_GAP = 1.0

# --- priors ---------------------------------------------------------------------------------------

BASE_SD = 1e3  # octaves. So wide that the prior of the base learning rate is flat
CERTAIN = 1e-3  # octaves. A standard deviation so small that it does not matter
USUAL_PIVOT = 16.0  # the pivot if no LoRA rank was tried: judgement
# Octaves: standard deviation of a rank's own best learning rate about a power of the rank. Over 21
# sweeps of the study it was 0.29, of which 0.17 is noise: simulated.md, benchmarks/answers.md
MODEL_ERROR = 0.2
# Octaves per octave of rank, by init: mean and standard deviation of the drift. In small studies,
# best learning rates at A = 0 (init B) fell with rank by 0.3 to 0.75: judgement
DRIFT = {"A": (0.0, 0.15), "B": (-0.45, 0.2)}
# Octaves, by init: standard deviation of the law's learning rate for full finetuning if only LoRA
# was tried. In the study it was 0.79 from B = 0, 0.84 from all ranks at A = 0, and 0.4 to 0.6 from
# high ranks at A = 0. The mean is 0, because the law needs no factor at Survey.full_width:
# init_b_forms.md, benchmarks/answers.md
FULL_SD = {"A": 0.8, "B": 0.6}
# Octaves of learning rate per octave of steps: standard deviation of the slope. It is the smallest
# of five values for which the intervals contained the best learning rate at eight times the steps
# on four tasks: benchmarks/answers.md
SLOPE_SD = 0.4
SLOPE_LENGTH = 1.5  # λ: octaves of steps over which slopes are alike: judgement
