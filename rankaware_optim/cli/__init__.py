"""The command `rankaware`."""

from ._main import main

__all__ = ["main"]
