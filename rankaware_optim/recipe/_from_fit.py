"""This module creates a recipe from the result of a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .._types import Reference
from ..fitting import Fit, centred_law
from ..laws import Law
from ._rates import margin, spread
from ._recipe import Recipe

_DIVERGED_BELOW = (
    "a run diverged at the learning rate {:.3g}, which is below the fitted optimum, so the recipe"
    " has no ceiling. Repeat that run to find out whether it diverges again"
)


def recipe_of(fit: Fit, law: Law, reference: Reference, **others: Any) -> Recipe:
    """Create a recipe from a fit, and compute the safety margin from the fit's uncertainty.

    Args:
        fit: the fit, for the number of steps of the final run.
        law: the scaling law for the optimizer, without the correction that was fitted.
        reference: the configuration of the base learning rate.
        others: the other fields of `Recipe`, which do not come from the fit.
    """
    base, drift, factor = (float(value) for value in fit.mean)
    best = fit.best(reference.rank)
    ceiling = None
    if fit.ceiling is not None:
        # The fit's ceiling is at the law's pivot rank. Multiply it by the ratio of the best
        # learning rates at the reference and at the pivot.
        ceiling = 2.0 ** (fit.ceiling + best - base)
        # A run that diverged below the optimum was probably bad luck, and a ceiling below the
        # learning rate to use would contradict the recipe. A note reports the run instead.
        if ceiling <= 2.0**best:
            note = _DIVERGED_BELOW.format(ceiling)
            others["notes"] = (*others.get("notes", ()), note)
            ceiling = None
    recipe = Recipe(
        fitted_lr=2.0**best,
        reference=reference,
        law=centred_law(law, reference, fit.prior.pivot, drift, factor),
        covariance=fit.covariance,
        steepness=fit.steepness,
        scatter=fit.prior.scatter,
        ceiling=ceiling,
        **others,
    )
    # The margin depends on the recipe's uncertainty, which needs a recipe to be computed.
    sd, _ = spread(recipe, reference)
    return replace(recipe, margin=margin(recipe, sd))
