"""Warnings that are shown although other packages install warning filters."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType

from ._printing import printable
from .errors import RankAwareWarning

_HERE = str(Path(__file__).parent)
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
_SHOWN: set[tuple[str, str, int]] = set()


def warn(message: str) -> None:
    """Give a `RankAwareWarning` at the line of the user's code, outside this package and the
    frameworks.

    accelerate, transformers and Lightning silence warnings by module or completely. Only filters
    for RankAwareWarning and command-line options can hide this one.
    """
    message = printable(message)
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        level = level + 1
        frame = frame.f_back
    if not _is_silenced(frame.f_globals.get("__name__", "<unknown>")):
        warnings.warn(message, RankAwareWarning, stacklevel=level)
        return
    # changing the filters makes Python forget what it has shown
    here = (message, frame.f_code.co_filename, frame.f_lineno)
    if here in _SHOWN:
        return
    _SHOWN.add(here)
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=RankAwareWarning)
        warnings.warn(message, RankAwareWarning, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    """Return whether a frame is of this package or of a framework."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in _FRAMEWORKS or frame.f_code.co_filename.startswith(_HERE)


def _is_silenced(module: str) -> bool:
    """Return whether a filter for warnings of all kinds hides ours at a module."""
    if sys.warnoptions:
        return False
    for action, words, category, where, line in warnings.filters:
        of_ours = issubclass(RankAwareWarning, category) and not words and not line
        if of_ours and (where is None or where.match(module)):
            return action == "ignore" and category is not RankAwareWarning
    return False
