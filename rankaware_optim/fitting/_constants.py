"""This module contains the constants that the fit uses.

Each comment ends with the evidence for the number, which is a page of benchmarks/results, a section
of benchmarks/answers.md, or "judgement" if the value was chosen without a measurement.
(`calibration/_constants.py` contains the constants of the search.)
"""

from __future__ import annotations

import numpy as np

# --- curves and runs ------------------------------------------------------------------------------

TAIL = 5  # the score of a run is the mean of at least this many loss values: judgement
EARLY = (
    0.3  # before this fraction of its steps, a run is too short to be scored: judgement
)
# Means of TAIL loss values are compared in units of the standard deviation of a single value. If
# they differ by more than CLEAR, the difference is not noise: judgement
CLEAR = 1.5
# The same threshold for comparing the end of a curve with its beginning: judgement
ROSE = 2.0
# A run diverged if its final loss is above its initial loss by more than this fraction of the best
# run's improvement: judgement
DIVERGED = 0.25

# --- the loss model -------------------------------------------------------------------------------

# The grid of curve shapes, which `_loss_model` explains: judgement
NOISE = np.geomspace(0.002, 0.5, 6)  # σ, in units of the gain
SHOULDERS = np.array([0.4, 1.0, 4.0])  # h, in octaves: from a corner to a parabola
STEEPNESS = np.array([0.0, 1.5, 3.0, 4.5])  # a, per octave: from a parabola to a cliff
CURVATURE = np.geomspace(0.005, 2.0, 10)  # k, in units of the gain
USUAL_NOISE = 0.015  # median of the prior of σ: judgement
NOISE_SD = 1.2  # standard deviation of log σ in its prior: judgement
# How much log σ, log h, a and log k of a single rank differ from the values that all ranks share,
# as standard deviations: judgement
OF_RANK_SDS = (0.5, 0.7, 1.0, 0.7)
# The seed shifts the losses of all its runs together. The standard deviation of this shift, in
# units of σ: judgement
SEED_SD = 3.0
# This fraction of the variance σ² is noise that is correlated between similar learning rates.
# Without it, two of 210 calibrations chose a learning rate above one that diverged:
# benchmarks/answers.md
SMOOTH = 0.5
# Real loss curves do not have exactly the shape of the model. The assumed error of the model, as a
# fraction of a loss's distance from the best loss: judgement
SHAPE_ERROR = 0.2
LENGTH = 1.0  # correlation length of the correlated noise, octaves: judgement
GRID = 0.125  # distance between candidates for the optimum, octaves: judgement
# How far the candidates extend beyond the learning rates tried, octaves: judgement
BEYOND = 3.0
# In a fitted curve, the lowest loss may be below the loss of the best trial. The standard deviation
# of this distance in its prior, in units of the gain: judgement
BELOW_BEST = 0.1
# The fitted curve is checked against the good trials, whose losses are less than GOOD above the
# best one. If the error at one of them is above MOST_MISSED, the curve gives no estimates. For 95 %
# of the good trials in the study's recipes, the error is below 0.03. All three numbers are in units
# of the gain: judgement
GOOD = 0.3
MOST_MISSED = 0.06
# An estimated loss is only reported if its 90 % interval is at most this wide, in units of the
# gain. `_curve` describes how accurate such estimates are: judgement
KNOWN = 0.5
# The loss of an untrained run minus the best loss, in units of the gain: 1 by definition
UNTRAINED_GAP = 1.0

# --- priors ---------------------------------------------------------------------------------------

# A prior this wide is flat: the trials alone determine the base learning rate. Octaves: judgement
BASE_SD = 1e3
# A standard deviation this small fixes a value. Octaves: judgement
CERTAIN = 1e-3
USUAL_PIVOT = 16.0  # the pivot rank if no LoRA rank was tried: judgement
# How much the best learning rates of single ranks scatter around a power of the rank, as a standard
# deviation in octaves. In 21 sweeps of the study it was 0.29, of which 0.17 is noise of the sweeps:
# simulated.md, benchmarks/answers.md
MODEL_ERROR = 0.2
# The mean and standard deviation of the drift for each init, in octaves of learning rate per octave
# of rank. In small studies with A = 0 (init B), the best learning rate fell by 0.3 to 0.75 octaves
# per octave of rank: judgement
DRIFT = {"A": (0.0, 0.15), "B": (-0.45, 0.2)}
# How uncertain the learning rate of full finetuning is if only LoRA was tried, as a standard
# deviation in octaves for each init. In the study it was 0.79 for B = 0, 0.84 for A = 0 with all
# ranks, and 0.4 to 0.6 for A = 0 with high ranks. The mean is 0, because the scaling law needs no
# correction at Survey.full_width: init_b_forms.md, benchmarks/answers.md
FULL_SD = {"A": 0.8, "B": 0.6}
# How the best learning rate changes with the number of steps, as the standard deviation of the
# slope, in octaves of learning rate per octave of steps. Of five values that were compared, this is
# the smallest for which the intervals contained the best learning rate after eight times the steps
# on four tasks: benchmarks/answers.md
SLOPE_SD = 0.4
# λ, the number of octaves of steps over which slopes are similar: judgement
SLOPE_LENGTH = 1.5
