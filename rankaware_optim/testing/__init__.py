"""Checks of third-party extensions: a convention and a law."""

from ._convention import check_convention
from ._law import check_law

__all__ = ["check_convention", "check_law"]
