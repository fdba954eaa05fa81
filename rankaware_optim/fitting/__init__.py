"""The fit: from scored runs to a base rate, a drift in rank, and their covariance, with numpy alone."""

from ._loss_model import bowls_of, curves_of
from ._observations import (
    CLEAR,
    EARLY,
    TAIL,
    Observation,
    arms_of,
    best_fall,
    gain_of,
    height,
    impute,
    noise_of,
    recent,
    usual_noise,
)
from ._posterior import (
    Fit,
    Prior,
    all_rose,
    below_cliff,
    diverged,
    fit_observations,
    none_learned,
    shrink,
)
from ._priors import FULL_SD, Carry, Slope, carry_of, centred_law, prior_of

__all__ = [
    "CLEAR",
    "Carry",
    "EARLY",
    "FULL_SD",
    "Fit",
    "Observation",
    "Prior",
    "Slope",
    "TAIL",
    "all_rose",
    "arms_of",
    "below_cliff",
    "best_fall",
    "bowls_of",
    "carry_of",
    "centred_law",
    "curves_of",
    "diverged",
    "fit_observations",
    "gain_of",
    "height",
    "impute",
    "noise_of",
    "none_learned",
    "prior_of",
    "recent",
    "shrink",
    "usual_noise",
]
