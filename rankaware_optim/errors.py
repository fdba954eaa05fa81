"""Errors and warnings. Every message first states what is wrong and then what to do
about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._printing import printable

if TYPE_CHECKING:
    from .recipe import Recipe


class _CauseAndCure(BaseException):
    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(cause, cure)
        self.cause = cause
        self.cure = cure

    def __str__(self) -> str:
        return printable(f"{self.cause} {self.cure}")


class RankAwareError(_CauseAndCure, Exception):
    """The base class of all errors that this package raises.

    Args:
        cause: sentences on what is wrong.
        cure: sentences on what to do about it.
    """


class CallError(RankAwareError, TypeError):
    """A function call was almost correct. The message names the call that was probably
    meant. This error is also a `TypeError`, which Python raises for arguments that a
    function does not accept.
    """


class InspectionError(RankAwareError, ValueError):
    """The adapters in a model or in a file cannot be read."""


class InvalidReferenceError(RankAwareError, ValueError):
    """A configuration is incomplete or impossible."""


class LawError(RankAwareError, ValueError):
    """A scaling law is unknown, has impossible parameters, or returned an unusable multiplier."""


class OptimizerError(RankAwareError, ValueError):
    """The optimizer cannot be built or wrapped with these arguments."""


class CheckpointError(RankAwareError, ValueError):
    """An optimizer checkpoint does not fit the model."""


class RecipeError(RankAwareError, ValueError):
    """A recipe's file is missing, damaged or of another version, or the recipe has no learning rate
    for a configuration.
    """


class CalibrationError(RankAwareError, ValueError):
    """A calibration cannot run, or it has no result."""


class CalibrationInterrupted(_CauseAndCure, KeyboardInterrupt):
    """Ctrl-C was pressed during a calibration. `recipe` is the fit of the finished trials, or None
    if there were too few.

    This error is also a `KeyboardInterrupt`, so `except Exception` does not catch it.
    """

    recipe: Recipe | None = None


class PlotError(RankAwareError):
    """matplotlib is not installed, or there is nothing to draw."""


class RankAwareWarning(UserWarning):
    """A warning about something that the user should know. The program continues."""
