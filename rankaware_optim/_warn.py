"""Warnings at the line of the user's code."""

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


def warn(message: str) -> None:
    """Give a `RankAwareWarning` at the line of the user's code, outside this package and the
    frameworks, whose own modules may be muted, as accelerate mutes torch's schedulers.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message), RankAwareWarning, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    """Return whether a frame is of this package or of a framework."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in _FRAMEWORKS or frame.f_code.co_filename.startswith(_HERE)
