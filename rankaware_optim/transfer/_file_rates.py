"""The rates that an adapter on disk would train at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .._checks import check_lr
from .._survey_text import Rated
from .._types import Survey
from ..inspection import as_reference
from ..laws import DEFAULT_LAW


def survey_rates(
    survey: Survey, *, lr: float | None = None, law: str = DEFAULT_LAW, tuned_at: str | None = None
) -> tuple[Survey, Mapping[str, Rated]]:
    """The rate of every parameter by name from a base rate `lr`, none without it; and the survey with the law's notes.

    Raises:
        InvalidReferenceError: `tuned_at` is no reference. OptimizerError: `lr` is not a positive finite number.
        LawError: the law is unknown or gives no multiplier.
    """
    reference = None if tuned_at is None else as_reference(tuned_at)
    if lr is None:
        return survey, {}
    from ..optimizer import PlanOptions, make_plan, plan_rates  # they need torch

    base, plan = check_lr(lr), make_plan(survey, PlanOptions(law, tuned_at=reference))
    return replace(survey, notes=tuple(plan.notes)), plan_rates(plan, survey, base)
