"""Learning rates that stay right when the LoRA rank, alpha or init changes, or when you move to full finetuning."""

from .adapters import Factor, Reference, Survey
from .calibration import CalibrationInterrupted, calibrate
from .checkpoints import convert_scheduler_state, to_plain_state_dict
from .conformance import check_convention
from .conventions import Convention, register_convention
from .convert import Conversion, convert_lr
from .errors import (
    CalibrationError,
    CheckpointError,
    InspectionError,
    InvalidReferenceError,
    LawError,
    OptimizerError,
    RankAwareError,
    RankAwareWarning,
    RecipeError,
)
from .groups import rank_aware_param_groups
from .initialization import initialize
from .inspection import inspect_model
from .integrations import group_rates, log_rates, trainer_factory
from .laws import Constant, Law, LoRAPlus, MuA, Power
from .optimizer import RankAwareOptimizer
from .recipe import Rate, Recipe
from .report import Report
from .schedulers import check_scheduler
from .trial import Trial

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CalibrationInterrupted",
    "CheckpointError",
    "Constant",
    "Convention",
    "Conversion",
    "Factor",
    "InspectionError",
    "InvalidReferenceError",
    "Law",
    "LawError",
    "LoRAPlus",
    "MuA",
    "OptimizerError",
    "Power",
    "RankAwareError",
    "RankAwareOptimizer",
    "RankAwareWarning",
    "Rate",
    "Recipe",
    "RecipeError",
    "Reference",
    "Report",
    "Survey",
    "Trial",
    "calibrate",
    "check_convention",
    "check_scheduler",
    "convert_lr",
    "convert_scheduler_state",
    "group_rates",
    "initialize",
    "inspect_model",
    "log_rates",
    "rank_aware_param_groups",
    "register_convention",
    "to_plain_state_dict",
    "trainer_factory",
]
