"""This module contains the constants of a calibration, for example thresholds. The
constants for fitting the loss curves are in `fitting/_constants.py`.

The comment on each constant ends with the evidence for its value: a page in
benchmarks/results, a question in benchmarks/answers.md, or the words "chosen by
judgement".
"""

from __future__ import annotations

from .._types import Reference

# --- the schedule ---------------------------------------------------------------------------------

# The default number of trials for each rank of the search. With 16 trials at two ranks, 0.5 % of
# the possible improvement is lost on average, with 8 trials 0.8 %, and with 5 trials 1.8 %:
# simulated.md
TRIALS_PER_RANK = 8
SEEDS = (0, 1)  # the default random seeds of the trials: chosen by judgement
# The number of trials of a rank with one seed before the next seed is used. Runs with the same seed
# share the same noise, so they can be compared: chosen by judgement
PER_SEED = 4
# The number of trials of the highest rank before any other rank is tried, because losses of
# different ranks cannot be compared. If this many runs have learned nothing, the search continues
# at lower learning rates. The number was chosen on the simulated surfaces after they had been seen:
# simulated.md
BRACKET = 3
# The number of these trials if the loss rises in all of them. In simulations, 4 and 16 trials are
# not worse: benchmarks/answers.md
MOST_BRACKET = 8
# In trials with fewer steps than this, low learning rates look best, because noise hides their
# slower progress: chosen by judgement
FEWEST_STEPS = 100

# --- the first learning rate ----------------------------------------------------------------------

# The usual learning rate of each optimizer family, and the configuration for which it is usual. For
# sign-like optimizers it is the median of the best AdamW learning rates of 18 published language
# models: suggestion.md. The other values are customary: chosen by judgement
USUAL_AT = Reference(rank=16, alpha=32, fan_in=4096)
USUAL_LR = {
    "sign-like": 2.0**-11.8,
    "gradient-like": 2.0**-4,
    "spectral": 2.0**-8,
    "relative-scale": 2.0**-8,
    "floored-scale": 2.0**-8,
}
# The largest |log2| of a learning rate that a stored trial may have. No model trains at a learning
# rate that is even close to this limit
MOST_OCTAVES = 330.0

# --- the search -----------------------------------------------------------------------------------

# An octave is a factor of two. Trials that bracket the optimum are this many octaves apart, the
# first trial is this many octaves above the usual learning rate, and the range of the search is
# widened by this many octaves. The first trial should be too high rather than too low, because then
# it stops early and shows where runs diverge: chosen by judgement
STRIDE = 2.0
# If the target run has at least this many octaves more steps than a trial, the search never goes
# below the suggested learning rate. Trials of an eighth of the run are 3 octaves shorter than the
# run, and trials of a quarter are 2 octaves shorter: chosen by judgement
FAR = 2.5
# If a search has at most FEW_TRIALS trials at one rank, its optimum is found with a parabola. The
# recipe then has no margin, and its interval covers at most CAP octaves on either side: search.md
FEW_TRIALS = 4
CAP = 1.75
HALF_RANGE = 4.0  # octaves on either side of the first guess: chosen by judgement
# If the best run is at most this many octaves from an end of the range, the range is widened:
# chosen by judgement
EDGE = 1.0
# A run is clearly worse than the best run if its score is worse by this fraction of the amount by
# which training reduces the loss. In simulations, 0 to 0.5 are not worse: benchmarks/answers.md
CLEARLY = 0.25
# The octaves from the fitted optimum at which more trials of a rank are placed: first the first
# four, then the other four. Most of them are below the optimum, because the loss rises faster above
# it: chosen by judgement
OFFSETS = ((0.5, -1.0, 1.25, -2.0), (0.0, -0.5, -1.5, 0.85))
# A trial stays this many octaves below the lowest run that diverged: chosen by judgement
CLEARANCE = 0.5
# A trial stays this many octaves away from learning rates that are being tried, or that were tried
# at the same rank: chosen by judgement
TAKEN = 0.25
FULL_STEP = 1.0  # octaves between trials of full finetuning after the search: chosen by judgement

# --- stopping a run early (pruning), all chosen by judgement --------------------------------------

REPORTS = 10  # the number of times that a run reports its mean loss to the storage
JUDGED = 3  # the number of a run's last reports that are compared with the best run
# In each of these reports, a run must be worse than the best run by this fraction of the amount by
# which the best run has reduced its loss so far
WORSE = 0.5
NEAR = 1.0  # no run is stopped within this many octaves of the best run or the optimum
STANDARD_ERRORS = (
    3.0  # the mean difference to the best run must be this many standard errors
)

# --- checks of runs and recipes -------------------------------------------------------------------

# If the warm-up takes more than this fraction of a trial's steps, a note is added: chosen by
# judgement
LONG_WARMUP = 0.25
# If the highest and the lowest of four mean rewards differ by less than this many standard errors,
# the trials count as different only by chance. Chance alone exceeds this limit in one of 20
# calibrations: the studentized range
ALIKE_ERRORS = 3.6

# After so few steps a weight may not have changed yet, because a warm-up begins at zero or the loop
# yields before the optimizer's step: chosen by judgement
FIRST_STEPS = 2
# The highest learning rate that a trial used is divided by the learning rate that the trial was
# given. Between two trials, this ratio may differ by at most this factor: chosen by judgement
SAME_PEAK = 1.1
# If the standard deviation of the best learning rate is larger than this number of octaves, the
# trials hardly determine the best learning rate: chosen by judgement
UNDETERMINED = 0.75
# The first values of two runs with the same seed may differ by this fraction: chosen by judgement
SAME = 1e-3

# A returned score probably should be maximised if its rank correlation with the final losses is at
# most OPPOSED in RANKED runs or more, or -1 in LEAST_RANKED runs or more: chosen by judgement
RANKED, OPPOSED = 6, -0.8
LEAST_RANKED = 4
# A returned score probably should also be maximised if the loss of the run with the best score fell
# by less than this fraction of the largest fall: chosen by judgement
LITTLE = 0.25

# --- workers and processes, all chosen by judgement -----------------------------------------------

BEAT_S = 10.0  # seconds between two heartbeats, and between two polls of other workers' heartbeats
MISSED = (
    4  # a worker counts as dead after this many polls in a row without a new heartbeat
)
JOIN_S = 10.0  # seconds to wait at the end for a heartbeat that is being written
# While a worker waits for others, it reads the storage after these pauses in seconds: the first
# pause and the longest pause
POLL_S, SLOW_POLL_S = 0.05, 2.0
LOCK_S = (
    120.0  # seconds to wait for a journal's lock, which a suspended process may hold
)
# The number of attempts to create a database while other processes create it too. Each failure
# means that one more of its 13 tables exists
ATTEMPTS = 30
