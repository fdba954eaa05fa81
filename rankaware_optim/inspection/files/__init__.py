"""Adapters on disk, read by their headers alone."""

from ._inspect_file import inspect_file
from ._peft_config import read_config

__all__ = ["inspect_file", "read_config"]
