"""Checks of third-party extensions: a convention and a law."""

from ._convention import check_convention
from ._coordinate_check import CoordinateCheck, CoordinateRow, coordinate_check
from ._law import LawConformance, check_law

__all__ = [
    "CoordinateCheck",
    "CoordinateRow",
    "LawConformance",
    "check_convention",
    "check_law",
    "coordinate_check",
]
