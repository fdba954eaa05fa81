"""Warnings that are shown although other packages install warning filters."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from ._printable import printable
from .errors import RankAwareWarning

__all__ = ["warn"]

_OWN = str(Path(__file__).parent)
_FRAMEWORKS = (
    "torch",
    "accelerate",
    "transformers",
    "lightning",
    "pytorch_lightning",
    "trl",
    "deepspeed",
    "peft",
)


def warn(message: str) -> None:
    """Give a `RankAwareWarning` at the line of the user's code, outside this package and the
    frameworks.

    accelerate, transformers and Lightning silence warnings by module or completely. Only filters
    for RankAwareWarning and command-line options can hide this one.
    """
    message, level, frame = printable(message), 1, sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _FRAMEWORKS and not frame.f_code.co_filename.startswith(_OWN):
            break
        level, frame = level + 1, frame.f_back
    module = frame.f_globals.get("__name__", "<unknown>")
    for action, words, category, where, line in warnings.filters:
        if (
            issubclass(RankAwareWarning, category)
            and not (words or line)
            and (where is None or where.match(module))
        ):
            if action == "ignore" and category is not RankAwareWarning and not sys.warnoptions:
                with warnings.catch_warnings():
                    warnings.filterwarnings("default", category=RankAwareWarning)
                    warnings.warn(message, RankAwareWarning, stacklevel=level + 1)
                return
            break
    warnings.warn(message, RankAwareWarning, stacklevel=level + 1)
