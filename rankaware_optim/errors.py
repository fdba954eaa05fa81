"""This module defines the errors and warnings of the package.

Every error message first explains what is wrong and then tells the user what to do.
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
    """This error is raised if a function call was almost correct, for example with a misspelled
    argument. The error message names the call that was probably meant. This error is also a
    `TypeError`, which Python raises for arguments that a function does not accept.
    """


class InspectionError(RankAwareError, ValueError):
    """This error is raised if the LoRA adapters in a model or in a file cannot be read."""


class InvalidReferenceError(RankAwareError, ValueError):
    """This error is raised if a configuration is incomplete or impossible, for example a rank
    without alpha.
    """


class LawError(RankAwareError, ValueError):
    """This error is raised if a scaling law is unknown, has impossible parameters, or
    returned an unusable multiplier.
    """


class OptimizerError(RankAwareError, ValueError):
    """This error is raised if an optimizer cannot be built or wrapped with the given arguments."""


class CheckpointError(RankAwareError, ValueError):
    """This error is raised if a checkpoint of the optimizer does not match the model."""


class RecipeError(RankAwareError, ValueError):
    """This error is raised if a recipe cannot be loaded or cannot compute a learning rate.

    A recipe cannot be loaded if its file is missing or damaged, or if an incompatible
    version of this package wrote the file.
    """


class CalibrationError(RankAwareError, ValueError):
    """This error is raised if a calibration cannot start, or ended without a result."""


class CalibrationInterrupted(_CauseAndCure, KeyboardInterrupt):
    """This error is raised if the user presses Ctrl-C during a calibration.

    The `recipe` attribute contains the recipe that was fitted to the finished trials, or
    None if too few trials had finished. This error is also a `KeyboardInterrupt`, so
    `except Exception` does not catch it.
    """

    recipe: Recipe | None = None


class PlotError(RankAwareError):
    """This error is raised if matplotlib is not installed, or if there is nothing to draw."""


class RankAwareWarning(UserWarning):
    """A warning about a possible problem that does not stop the program."""
