"""Checks for those who extend the package: of a convention, and of a law."""

from ._convention import check_convention
from ._law import LawConformance, check_law

__all__ = ["LawConformance", "check_convention", "check_law"]
