"""The rates that an adapter on disk would train at."""

from __future__ import annotations

from dataclasses import replace

from .._checks import check_lr
from .._types import Survey
from ..inspection import as_reference
from ..laws import DEFAULT_LAW


def survey_report(
    survey: Survey,
    *,
    lr: float | None = None,
    law: str = DEFAULT_LAW,
    tuned_at: str | None = None,
    per_module: bool = False,
) -> str:
    """What a survey holds in words, alike factors on one line unless `per_module`; with a base rate `lr` its rates."""
    reference = None if tuned_at is None else as_reference(tuned_at)
    if lr is None:
        return survey.explain(per_module=per_module)
    from ..optimizer import PlanOptions, make_plan, plan_rates  # they need torch

    base, plan = check_lr(lr), make_plan(survey, PlanOptions(law, tuned_at=reference))
    rates = plan_rates(plan, survey, base)
    return replace(survey, notes=tuple(plan.notes)).explain(per_module=per_module, rates=rates)
