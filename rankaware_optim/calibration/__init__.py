"""Calibration: a short study of the base rate at several ranks, whose result is a recipe."""

from ._api import calibrate
from ._in_place import calibrate_in_place
from ._provenance import versions_used
from ._ray import RayExecutor
from ._trial import Pushed, Trial, release_memory, seeded

__all__ = [
    "Pushed",
    "RayExecutor",
    "Trial",
    "calibrate",
    "calibrate_in_place",
    "release_memory",
    "seeded",
    "versions_used",
]
