"""The fit: scored trials become a base rate, a drift in rank, and their covariance."""

from ._horizon_fit import horizon_of
from ._posterior import MODEL_ERROR, Fit, Observation, Prior, diverged, fit_observations, gain_of, shrink

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
