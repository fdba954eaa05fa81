"""`RankAwareOptimizer`: parameter groups with their rates, checkpoints, and the report."""

from ._param_groups import rank_aware_param_groups
from ._plain import convert_scheduler_state, to_plain_state_dict
from ._plan import PlanOptions, make_plan
from ._report import Report, plan_rates
from ._schedulers import check_scheduler
from ._wrapper import RankAwareOptimizer

__all__ = [
    "PlanOptions",
    "RankAwareOptimizer",
    "Report",
    "check_scheduler",
    "convert_scheduler_state",
    "make_plan",
    "plan_rates",
    "rank_aware_param_groups",
    "to_plain_state_dict",
]
