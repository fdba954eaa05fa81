"""The constants of a calibration. The end of each comment is its evidence: a page of
benchmarks/results, a frozen answer of benchmarks/README.md, or "by hand".
"""

from __future__ import annotations

from .._types import Reference

# --- the schedule ---------------------------------------------------------------------------------

# Runs of the search for each rank, where none are given. 16 runs at two ranks lose .5 % in the
# mean, 8 lose .8 and 5 lose 1.8: simulated.md
TRIALS_PER_RANK = 8
SEEDS = (0, 1)  # of the trials, in turn: by hand
# Runs of a rank at one seed before the next seed, since runs of one seed share its noise: by hand
PER_SEED = 4
# Runs of the highest rank before any other, since losses of different ranks cannot be compared, and
# before the search turns downwards if none learned; it was chosen on the simulated surfaces, after
# they had been seen: simulated.md
BRACKET = 3
# The same, while all of them rise. Chosen by judgement: 4 and 16 are no worse in simulation
# (benchmarks/answers.md)
MOST_BRACKET = 8
# Steps of a trial below which low rates look best, since noise hides what they lose: by hand
FEWEST_STEPS = 100

# --- the first rate -------------------------------------------------------------------------------

# A usual rate by optimizer family, and its configuration. For sign-like optimizers it is the median
# best AdamW rate of 18 published language models: suggestion.md. The others are customary: by hand
USUAL_AT = Reference(rank=16, alpha=32, fan_in=4096)
USUAL_LR = {
    "sign-like": 2.0**-11.8,
    "gradient-like": 2.0**-4,
    "spectral": 2.0**-8,
    "relative-scale": 2.0**-8,
    "floored-scale": 2.0**-8,
}
MOST_OCTAVES = 330.0  # no rate of a trial is farther from 1: its meaning

# --- the search -----------------------------------------------------------------------------------

# Octaves between the trials that bracket, from the usual rate up to the first one, since a run too
# high stops early and shows the cliff, and by which an edge of the range moves: by hand
STRIDE = 2.0
# Octaves from a trial's steps to the target's, from which the search stays at the suggested rate or
# above it: an eighth is 3, a quarter 2: by hand
FAR = 2.5
# At most so many trials at one rank are read by a parabola, without a margin, and with an interval
# of at most so many octaves to either side: search.md
FEW_TRIALS = 4
CAP = 1.75
HALF_RANGE = 4.0  # octaves on either side of the first guess: by hand
EDGE = 1.0  # octaves from an edge of the range that count as being there: by hand
# Share of the gain by which a rate above the best is clearly worse: by hand, 0 to .5 are no worse
# in simulation: benchmarks/answers.md
CLEARLY = 0.25
# Octaves from the estimated optimum, in order. The low side is safer, since the loss rises faster
# above: by hand
OFFSETS = ((0.5, -1.0, 1.25, -2.0), (0.0, -0.5, -1.5, 0.85))
CLEARANCE = 0.5  # octaves to stay below the lowest rate that diverged: by hand
# Octaves to stay away from rates that run, or that the rank has run: by hand
TAKEN = 0.25
FULL_STEP = 1.0  # octaves between runs of full finetuning after the search: by hand

# --- pruning --------------------------------------------------------------------------------------

REPORTS = 10  # reports of a run to the storage: by hand
JUDGED = 3  # last reports of a run that are compared: by hand
WORSE = 0.5  # share of the best run's gain so far by which a pruned run lags: by hand
# Octaves from the best run and the optimum in which nothing is pruned: by hand
NEAR = 1.0
STANDARD_ERRORS = 3.0  # of the mean lag, which must exceed them: by hand

# --- what a run and a recipe are checked for ------------------------------------------------------

LONG_WARMUP = 0.25  # share of a trial's steps above which a warm-up is said: by hand
# Standard errors between the highest and the lowest of four means of rewards, which chance exceeds
# in one of 20 calibrations: the studentized range
ALIKE_ERRORS = 3.6

# Steps that a warm-up from zero, or a value yielded before its step, may leave without effect
FEW = 2  # by hand
# Factor by which the highest learning rates of two trials may differ, beside the factor between the
# rates that they try: by hand
SAME_PEAK = 1.1
# Octaves: with a larger standard deviation the data hardly determine the base rate: by hand
UNDETERMINED = 0.75
SAME = 1e-3  # relative tolerance for the first values of two runs of one seed: by hand

# A returned score looks like one that should be maximised if its rank correlation with the final
# losses is at most OPPOSED in RANKED runs or more, or -1 in LEAST_RANKED or more: by judgement
RANKED, OPPOSED = 6, -0.8
LEAST_RANKED = 4
# It does, too, if the loss of the run with the best score fell by less than this share of the
# largest fall: by judgement
LITTLE = 0.25

# --- processes: all by hand -----------------------------------------------------------------------

# Seconds between two heartbeats, and between two looks at those of others
BEAT_S = 10.0
MISSED = 4  # looks in a row without a new heartbeat after which a trial counts as dead
JOIN_S = 10.0  # seconds that a heartbeat's write in progress may take at the end
# Seconds between looks for other workers: first and longest
POLL_S, SLOW_POLL_S = 0.05, 2.0
LOCK_S = 120.0  # seconds to wait for a journal's lock, which a stopped process may hold
# Attempts to create a database while others do; each failure means that one of 13 tables exists now
ATTEMPTS = 30
