"""Adapters on disk. Only their headers are read."""

from ._inspect_file import inspect_file
from ._peft_config import read_config
from ._training import Training, read_training

__all__ = ["Training", "inspect_file", "read_config", "read_training"]
