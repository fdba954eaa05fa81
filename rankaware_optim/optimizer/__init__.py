"""`RankAwareOptimizer`: parameter groups and their rates, checkpoints, and the report."""

from ._param_groups import effective_lr, rank_aware_param_groups
from ._plain import to_plain_state_dict
from ._plan import PlanOptions, make_plan
from ._report import Report, plan_rates
from ._wrapper import RankAwareOptimizer, recipe_of

__all__ = [
    "PlanOptions",
    "RankAwareOptimizer",
    "Report",
    "effective_lr",
    "make_plan",
    "plan_rates",
    "rank_aware_param_groups",
    "recipe_of",
    "to_plain_state_dict",
]
