"""Checks of third-party extensions: a convention and a law."""

from ._convention import check_convention
from ._law import LawConformance, check_law

__all__ = ["LawConformance", "check_convention", "check_law"]
