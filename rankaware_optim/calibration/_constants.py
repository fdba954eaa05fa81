"""The numbers that a calibration uses (those of the fit are in `fitting/_constants.py`).

Each comment ends with the constant's evidence: a page of benchmarks/results, a question of
benchmarks/answers.md, or "chosen by judgement".
"""

from __future__ import annotations

from .._types import Reference

# --- the schedule ---------------------------------------------------------------------------------

# Trials of the search for each rank, by default. With 16 trials at two ranks 0.5 % of the possible
# improvement is lost in the mean, with 8 trials 0.8 %, and with 5 trials 1.8 %: simulated.md
TRIALS_PER_RANK = 8
SEEDS = (0, 1)  # of the trials, in turn: chosen by judgement
# Trials of a rank with one seed before the next seed. Runs of one seed share its noise, so they can
# be compared: chosen by judgement
PER_SEED = 4
# Trials of the highest rank before any other rank, because losses of different ranks cannot be
# compared. As many runs that learned nothing turn the search downwards. It was chosen on the
# simulated surfaces, after they had been seen: simulated.md
BRACKET = 3
# The same, as long as all of these runs rise. In simulation 4 and 16 do no worse:
# benchmarks/answers.md
MOST_BRACKET = 8
# Steps of a trial below which low learning rates look best, because noise hides what they lose:
# chosen by judgement
FEWEST_STEPS = 100

# --- the first learning rate ----------------------------------------------------------------------

# A usual learning rate by optimizer family, and the configuration to which it belongs. For
# sign-like optimizers it is the median best AdamW learning rate of 18 published language models:
# suggestion.md. The others are customary: chosen by judgement
USUAL_AT = Reference(rank=16, alpha=32, fan_in=4096)
USUAL_LR = {
    "sign-like": 2.0**-11.8,
    "gradient-like": 2.0**-4,
    "spectral": 2.0**-8,
    "relative-scale": 2.0**-8,
    "floored-scale": 2.0**-8,
}
# The bound of |log2| of a trial's learning rate, far beyond any that trains
MOST_OCTAVES = 330.0

# --- the search -----------------------------------------------------------------------------------

# Octaves between the trials that bracket the optimum, from the usual learning rate up to the first
# trial's, and by which an edge of the range moves. The first trial is too high rather than too low,
# because then it stops early and shows the cliff: chosen by judgement
STRIDE = 2.0
# If the target run has at least this many octaves more steps than a trial, the search stays at the
# suggested learning rate or above. Trials of an eighth of the run are 3 octaves shorter, and of a
# quarter 2: chosen by judgement
FAR = 2.5
# A search of at most so many trials at one rank is read by a parabola, without a margin, and with
# an interval of at most so many octaves to either side: search.md
FEW_TRIALS = 4
CAP = 1.75
HALF_RANGE = 4.0  # octaves on either side of the first guess: chosen by judgement
EDGE = 1.0  # a best run within so many octaves of an edge widens the range: chosen by judgement
# A run is clearly worse than the best if its score is worse by this share of what training gains.
# In simulation 0 to 0.5 do no worse: benchmarks/answers.md
CLEARLY = 0.25
# Octaves from the fitted optimum at which a rank is refined: the first four, then the others. More
# of them are below it, because the loss rises faster above: chosen by judgement
OFFSETS = ((0.5, -1.0, 1.25, -2.0), (0.0, -0.5, -1.5, 0.85))
# Octaves to stay below the lowest run that diverged: chosen by judgement
CLEARANCE = 0.5
# Octaves to stay away from what is running, or was tried at the rank: chosen by judgement
TAKEN = 0.25
FULL_STEP = 1.0  # octaves between trials of full finetuning after the search: chosen by judgement

# --- stopping a run early (pruning), all chosen by judgement --------------------------------------

REPORTS = 10  # a run reports its mean to the storage so many times
JUDGED = 3  # so many of its last reports are compared with those of the best run
WORSE = 0.5  # share of the best run's gain so far by which each of them must be worse
NEAR = 1.0  # octaves around the best run and the optimum in which nothing is stopped
STANDARD_ERRORS = 3.0  # the mean lag must be so many times its standard error

# --- checks of runs and recipes -------------------------------------------------------------------

# A warm-up over more than this share of a trial's steps adds a note: chosen by judgement
LONG_WARMUP = 0.25
# If the highest and the lowest of four mean rewards are less than so many standard errors apart,
# the trials differ by chance. Chance exceeds it in one calibration of 20: the studentized range
ALIKE_ERRORS = 3.6

# After so few steps a weight may not have moved yet, because a warm-up begins at zero or the loop
# yields before its step: chosen by judgement
FIRST_STEPS = 2
# The highest learning rates that two trials used, each relative to the one that the trial tries,
# may differ by this factor: chosen by judgement
SAME_PEAK = 1.1
# Octaves. With a larger standard deviation the data hardly determine the learning rate: chosen by
# judgement
UNDETERMINED = 0.75
# The first values of two runs with the same seed may differ by this share: chosen by judgement
SAME = 1e-3

# A returned score looks like one that should be maximised if its rank correlation with the final
# losses is at most OPPOSED in RANKED runs or more, or -1 in LEAST_RANKED or more: chosen by
# judgement
RANKED, OPPOSED = 6, -0.8
LEAST_RANKED = 4
# It does, too, if the loss of the run with the best score fell by less than this share of the
# largest fall: chosen by judgement
LITTLE = 0.25

# --- workers and processes, all chosen by judgement -----------------------------------------------

BEAT_S = 10.0  # seconds between two heartbeats, and between two polls of other workers' heartbeats
MISSED = 4  # polls in a row without a new heartbeat after which a worker counts as dead
JOIN_S = 10.0  # seconds to wait at the end for a heartbeat that is being written
# Seconds between two looks at what other workers have done: the first pause, and the longest
POLL_S, SLOW_POLL_S = 0.05, 2.0
LOCK_S = 120.0  # seconds to wait for a journal's lock, which a stopped process may hold
# Attempts to create a database while other processes create it. Each failure means that one more of
# its 13 tables exists
ATTEMPTS = 30
