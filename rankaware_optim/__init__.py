"""Learning rates that stay right when the LoRA rank, alpha or init changes, or when you move to full finetuning."""

from .adapters import Factor, Reference, Survey
from .calibration import calibrate
from .checkpoints import convert_scheduler_state, to_plain_state_dict
from .conformance import check_convention
from .conventions import Convention, register_convention
from .convert import Conversion, convert_lr
from .coordinate import CoordinateCheck, capture, coordinate_check
from .errors import (
    CalibrationError,
    CalibrationInterrupted,
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
from .in_place import calibrate_in_place
from .initialization import initialize
from .inspection import inspect_model
from .integrations import group_rates, log_rates, trainer_factory
from .law_check import LawConformance, check_law
from .laws import Constant, Falling, Law, LoRAPlus, MuA, Power
from .measured import Measured
from .optimizer import RankAwareOptimizer
from .recipe import Rate, Recipe
from .report import Report
from .schedulers import check_scheduler
from .suggestion import Suggestion, suggest_lr
from .sweeps import fit_sweep
from .trainers import calibrate_trainer
from .trial import Trial
from .yardstick import bench_law

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CalibrationInterrupted",
    "CheckpointError",
    "Constant",
    "Convention",
    "Conversion",
    "CoordinateCheck",
    "Factor",
    "Falling",
    "InspectionError",
    "InvalidReferenceError",
    "Law",
    "LawConformance",
    "LawError",
    "LoRAPlus",
    "Measured",
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
    "Suggestion",
    "Survey",
    "Trial",
    "bench_law",
    "calibrate",
    "calibrate_in_place",
    "calibrate_trainer",
    "capture",
    "check_convention",
    "check_law",
    "check_scheduler",
    "convert_lr",
    "convert_scheduler_state",
    "coordinate_check",
    "fit_sweep",
    "group_rates",
    "initialize",
    "inspect_model",
    "log_rates",
    "rank_aware_param_groups",
    "register_convention",
    "suggest_lr",
    "to_plain_state_dict",
    "trainer_factory",
]
