"""Errors and warnings: every one says what is wrong and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._printable import printable

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = [
    "CalibrationError",
    "CalibrationInterrupted",
    "CheckpointError",
    "DemoError",
    "PageError",
    "InspectionError",
    "LawError",
    "OptimizerError",
    "PlotError",
    "RankAwareError",
    "RankAwareWarning",
    "RecipeError",
    "InvalidReferenceError",
]


class _CauseAndCure(BaseException):
    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(cause, cure)
        self.cause = cause
        self.cure = cure

    def __str__(self) -> str:
        return printable(f"{self.cause} {self.cure}")


class RankAwareError(_CauseAndCure, Exception):
    """Base of all errors of this package: one sentence of cause, one of cure."""


class InspectionError(RankAwareError, ValueError):
    """The model's adapters cannot be read as they are."""


class InvalidReferenceError(RankAwareError, ValueError):
    """A `Reference` is incomplete or impossible."""


class LawError(RankAwareError, ValueError):
    """A law is unknown, has impossible parameters, or gave no usable multiplier."""


class OptimizerError(RankAwareError, ValueError):
    """The optimizer cannot be built or wrapped as asked."""


class CheckpointError(RankAwareError, ValueError):
    """An optimizer checkpoint does not fit the model."""


class RecipeError(RankAwareError, ValueError):
    """A recipe file is missing, damaged, of another schema, or asked for what it does not hold."""


class CalibrationError(RankAwareError, ValueError):
    """A calibration cannot run or cannot conclude."""


class CalibrationInterrupted(_CauseAndCure, KeyboardInterrupt):
    """Ctrl-C during a calibration. `recipe` is the fit of the finished trials, or None if there were too few.

    A `KeyboardInterrupt` and no `Exception`, so that `except Exception` does not swallow Ctrl-C.
    """

    recipe: Recipe | None = None


class PlotError(RankAwareError):
    """matplotlib is not installed, or the file cannot be written."""


class PageError(RankAwareError):
    """The page cannot be written."""


class DemoError(RankAwareError):
    """The demo lacks a package."""


class RankAwareWarning(UserWarning):
    """Something that works, and that a careful user would want to know."""
