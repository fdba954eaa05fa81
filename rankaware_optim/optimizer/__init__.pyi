from ._native_groups import rank_aware_param_groups as rank_aware_param_groups
from ._param_groups import effective_lr as effective_lr
from ._plan import PlanOptions as PlanOptions
from ._plan import make_plan as make_plan
from ._report import Report as Report
from ._state_dict import to_plain_state_dict as to_plain_state_dict
from ._unmoved import rounding_of_normal as rounding_of_normal
from ._wrapper import RankAwareOptimizer as RankAwareOptimizer
