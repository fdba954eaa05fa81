"""The fit: from scored trials to a base rate, a drift in rank, and their covariance."""

from ...recipe import Observation, gain_of
from ._carry import Carry, Slope
from ._posterior import Fit, Prior, all_rose, below_cliff, diverged, fit_observations, none_learned, shrink

__all__ = [
    "Carry",
    "Fit",
    "Observation",
    "Prior",
    "Slope",
    "all_rose",
    "below_cliff",
    "diverged",
    "fit_observations",
    "gain_of",
    "none_learned",
    "shrink",
]
