"""How a recipe is made from a fit: `recipe_of`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .._types import Reference
from ..fitting import Fit, centred_law
from ..laws import Law
from ._rates import margin, spread
from ._recipe import Recipe

_DIVERGED_BELOW = (
    "a run diverged at {:.3g}, below the fitted optimum, so the recipe has no ceiling: run it"
    " again to see whether it diverges a second time"
)


def recipe_of(fit: Fit, law: Law, reference: Reference, **others: Any) -> Recipe:
    """Return the recipe of a fit, with the margin that follows from its uncertainty.

    Args:
        fit: the fit, at the steps of the target.
        law: the law without the correction that was fitted, bound to the optimizer.
        reference: the configuration of the base learning rate.
        others: the fields of `Recipe` that the fit does not decide.
    """
    base, drift, factor = (float(value) for value in fit.mean)
    best = fit.best(reference.rank)
    ceiling = None
    if fit.ceiling is not None:
        # The fit has its ceiling at the pivot. The ceiling moves to the reference as the best
        # learning rate does.
        ceiling = 2.0 ** (fit.ceiling + best - base)
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
    sd, _ = spread(recipe, reference)
    return replace(recipe, margin=margin(recipe, sd))
