"""The rates for an adapter on disk."""

from __future__ import annotations

from dataclasses import replace

from .._checks import check_lr
from .._types import Survey
from ..inspection import as_reference
from ..laws import DEFAULT_LAW
from ..optimizer import PlanOptions, make_plan, plan_rates


def survey_report(
    survey: Survey,
    *,
    lr: float | None = None,
    law: str = DEFAULT_LAW,
    tuned_at: str | None = None,
    per_module: bool = False,
) -> str:
    """Return a survey as text, with its rates if `lr` is given.

    Args:
        survey: the survey, such as from `inspect_file`.
        lr: the base rate, per step.
        law: the law's name.
        tuned_at: the configuration of `lr`, as for `RankAwareOptimizer`.
        per_module: whether every tensor has its own line. Otherwise equal factors share one.
    """
    reference = None if tuned_at is None else as_reference(tuned_at)
    if lr is None:
        return survey.explain(per_module=per_module)
    base, plan = check_lr(lr), make_plan(survey, PlanOptions(law, tuned_at=reference))
    rates = plan_rates(plan, survey, base)
    return replace(survey, notes=tuple(plan.notes)).explain(per_module=per_module, rates=rates)
