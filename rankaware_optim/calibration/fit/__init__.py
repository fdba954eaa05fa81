"""The fit: from scored trials to a base rate, a drift in rank, and their covariance."""

from ...recipe import Observation, Place, gain_of
from ._posterior import Fit, Prior, all_rose, below_cliff, diverged, fit_observations, none_learned, shrink
from ._trend import Slope, Trend

__all__ = [
    "Trend",
    "Fit",
    "Observation",
    "Place",
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
