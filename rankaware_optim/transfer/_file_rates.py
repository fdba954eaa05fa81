"""The rates for an adapter on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .._checks import check_lr
from .._types import Rated, Survey
from ..inspection import as_reference
from ..laws import DEFAULT_LAW


def survey_rates(
    survey: Survey,
    *,
    lr: float | None = None,
    law: str = DEFAULT_LAW,
    tuned_at: str | None = None,
) -> tuple[Survey, Mapping[str, Rated]]:
    """Return a survey with the law's notes, and each factor's rate by name. Without `lr` there are
    no rates.

    Args:
        survey: the survey, such as from `inspect_file`.
        lr: the base rate, per step.
        law: the law's name.
        tuned_at: the configuration of `lr`, as for `RankAwareOptimizer`.
    """
    reference = None if tuned_at is None else as_reference(tuned_at)
    if lr is None:
        return survey, {}
    from ..optimizer import PlanOptions, make_plan, plan_rates  # they need torch

    base, plan = check_lr(lr), make_plan(survey, PlanOptions(law, tuned_at=reference))
    return replace(survey, notes=tuple(plan.notes)), plan_rates(plan, base)
