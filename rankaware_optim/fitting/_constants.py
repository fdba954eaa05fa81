"""The constants of the fit. The end of each comment is its evidence: a page of benchmarks/results,
a frozen answer of benchmarks/README.md, or "by hand".
"""

from __future__ import annotations

import numpy as np

# --- curves and runs ------------------------------------------------------------------------------

TAIL = 5  # fewest values in the mean that scores a run: by hand
EARLY = 0.3  # share of its steps before which a run is not judged: by hand
# A mean of TAIL values is clearly higher by so many standard deviations of one: by hand
CLEAR = 1.5
ROSE = 2.0  # the same, for a curve's end above its beginning: by hand
DIVERGED = 0.25  # share of the gain above its start, of a diverged run: by hand

# --- the loss model -------------------------------------------------------------------------------

# The grid of shapes: σ in units of the gain, h in octaves (from a corner to a parabola), a per
# octave (from a parabola to a cliff), k in units of the gain: by hand
NOISE = np.geomspace(0.002, 0.5, 6)
SHOULDERS = np.array([0.4, 1.0, 4.0])
STEEPNESS = np.array([0.0, 1.5, 3.0, 4.5])
CURVATURE = np.geomspace(0.005, 2.0, 10)
USUAL_NOISE = 0.015  # median of the prior of σ: by hand
NOISE_SD = 1.2  # standard deviation of log σ: by hand
# Standard deviations of a rank's log σ, log h, a and log k about the shared: by hand
OF_RANK_SDS = (0.5, 0.7, 1.0, 0.7)
SEED_SD = 3.0  # standard deviation of a seed's level, in units of σ: by hand
# Share of σ² that is smooth in the rate: by hand, without it two of 210
# calibrations had a rate above one that diverged: benchmarks/answers.md
SMOOTH = 0.5
SHAPE_ERROR = 0.2  # error of the shape, as a share of the gap to the best: by hand
LENGTH = 1.0  # correlation length of the smooth noise, octaves: by hand
GRID = 0.125  # octaves between candidate optima: by hand
BEYOND = 3.0  # octaves from the rates tried to the last candidate: by hand
# The widest 90 % interval of an estimated loss that is reported, in units of the gain: chosen by
# judgement
KNOWN = 0.5
# Gap to the best of an untrained run, in units of the gain: its meaning
UNTRAINED_GAP = 1.0

# --- priors ---------------------------------------------------------------------------------------

BASE_SD = 1e3  # octaves: a flat prior of the base rate
CERTAIN = 1e-3  # octaves: a negligible standard deviation
USUAL_PIVOT = 16.0  # the rank, where no LoRA rank was tried: by hand
# Octaves: standard deviation of a rank's own best rate about a power of the rank. It was .29 over
# 21 sweeps of the study, .17 of which is noise: simulated.md, benchmarks/answers.md
MODEL_ERROR = 0.2
# Octaves per octave of rank, by init: mean and standard deviation of the drift. Small studies found
# that rates at A = 0 fall with rank by 0.3 to 0.75: by hand
DRIFT = {"A": (0.0, 0.15), "B": (-0.45, 0.2)}
# Octaves, by init: standard deviation of the law's rate for full finetuning when only LoRA was
# tried. The study found .79 from B = 0, .84 from all ranks at A = 0, from high ones .4 to .6.
# Its mean is 0: no factor is needed at Survey.full_width: init_b_forms.md, benchmarks/answers.md
FULL_SD = {"A": 0.8, "B": 0.6}
# Octaves of rate per octave of steps: standard deviation of the slope, the least of five with which
# intervals contain the best one at eight times the steps on four tasks (benchmarks/answers.md)
SLOPE_SD = 0.4
SLOPE_LENGTH = 1.5  # λ: octaves of steps over which slopes are alike: by hand
