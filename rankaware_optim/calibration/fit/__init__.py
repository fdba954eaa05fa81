"""The fit: scored trials become a base rate, a drift in rank, and their covariance."""

from ...recipe import Observation, gain_of
from ._horizon_fit import horizon_of
from ._posterior import MODEL_ERROR, Fit, Prior, diverged, fit_observations, shrink

__all__ = [
    "Fit",
    "MODEL_ERROR",
    "Observation",
    "Prior",
    "diverged",
    "fit_observations",
    "gain_of",
    "horizon_of",
    "shrink",
]
