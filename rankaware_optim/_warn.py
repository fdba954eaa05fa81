"""This module shows warnings even if other packages install filters that hide them."""

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
    """Show a `RankAwareWarning` that points to a line of the user's code, instead of a
    line in this package or in a framework.

    accelerate, transformers and Lightning silence warnings of some modules, or all of them. A
    `RankAwareWarning` is shown even if a filter hides all warnings. The warning is hidden only if a
    filter names RankAwareWarning, or if Python was started with an option for warnings.
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
    # When the filters change, Python forgets which warnings it has already shown. Without
    # `_SHOWN`, this warning would therefore be repeated at every call.
    here = (message, frame.f_code.co_filename, frame.f_lineno)
    if here in _SHOWN:
        return
    _SHOWN.add(here)
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=RankAwareWarning)
        warnings.warn(message, RankAwareWarning, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    """Return whether a stack frame belongs to this package or to a framework."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in _FRAMEWORKS or frame.f_code.co_filename.startswith(_HERE)


def _is_silenced(module: str) -> bool:
    """Return whether a general filter would hide this package's warnings in a module."""
    # With python -W or PYTHONWARNINGS, the user has decided which warnings to see.
    if sys.warnoptions:
        return False
    for action, words, category, where, line in warnings.filters:
        of_ours = issubclass(RankAwareWarning, category) and not words and not line
        if of_ours and (where is None or where.match(module)):
            return action == "ignore" and category is not RankAwareWarning
    return False
