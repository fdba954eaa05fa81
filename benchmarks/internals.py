"""Imports the package's private names for all benchmarks, so that a change of the package is
followed here only.
"""

from rankaware_optim._optimizers import (
    get_optimizer_class,
    known_optimizer,
    optimizer_family,
)
from rankaware_optim.calibration._calibration import Calibration, calibrated_recipe
from rankaware_optim.calibration._few import vertex_of
from rankaware_optim.calibration._schedule import Options, next_setting
from rankaware_optim.calibration._search import next_rate, search_range
from rankaware_optim.calibration._trials import Build, Run, Setting, Trials
from rankaware_optim.laws._mua import FORMS, kappa
from rankaware_optim.reports._figure import COLOURS, rate_axis
from rankaware_optim.sweeps._read import Source, SweepRun, read_sweep
from rankaware_optim.transfer._suggest import (
    FULL_LOG2_RATE,
    FULL_RL,
    FULL_RL_HIGH,
    FULL_RL_LOW,
    FULL_SPREAD,
    LOG2_RATE,
    PUBLISHED,
    SPREAD,
    TASK_SD,
    Z90,
)

__all__ = [
    "COLOURS",
    "Calibration",
    "FORMS",
    "FULL_LOG2_RATE",
    "FULL_RL",
    "FULL_RL_HIGH",
    "FULL_RL_LOW",
    "FULL_SPREAD",
    "LOG2_RATE",
    "Options",
    "PUBLISHED",
    "SPREAD",
    "Run",
    "Setting",
    "Build",
    "Source",
    "SweepRun",
    "TASK_SD",
    "Trials",
    "Z90",
    "calibrated_recipe",
    "get_optimizer_class",
    "kappa",
    "known_optimizer",
    "next_rate",
    "next_setting",
    "optimizer_family",
    "rate_axis",
    "read_sweep",
    "search_range",
    "vertex_of",
]
