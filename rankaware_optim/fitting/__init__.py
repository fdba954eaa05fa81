"""The fit: from scored runs to a base rate, a drift in rank, and their covariance."""

from ._constants import CLEAR, EARLY, FULL_SD, TAIL
from ._observations import (
    Observation,
    all_rose,
    arms_of,
    below_cliff,
    best_fall,
    diverged,
    gain_of,
    height,
    impute,
    noise_of,
    none_learned,
    recent,
    split,
    usual_noise,
)
from ._posterior import Fit, Prior, fit_observations
from ._priors import (
    at_target,
    centred_law,
    prior_of,
    steps_variance,
)

__all__ = [
    "CLEAR",
    "EARLY",
    "FULL_SD",
    "Fit",
    "Observation",
    "Prior",
    "TAIL",
    "all_rose",
    "arms_of",
    "at_target",
    "below_cliff",
    "best_fall",
    "centred_law",
    "diverged",
    "fit_observations",
    "gain_of",
    "height",
    "impute",
    "noise_of",
    "none_learned",
    "prior_of",
    "recent",
    "split",
    "steps_variance",
    "usual_noise",
]
