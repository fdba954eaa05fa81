"""This module combines several models that are trained together into one model."""

from __future__ import annotations

from typing import Any

from torch import nn


class Models(nn.ModuleList):
    """A module that contains several models.

    The name of every parameter begins with the number of its model, such as "0.".
    """


def as_one_model(model: Any) -> Any:
    """Combine a list of models into one module, and return any other value unchanged."""
    listed = isinstance(model, (list, tuple)) and len(model) > 0
    if listed and all(isinstance(each, nn.Module) for each in model):
        return Models(model)
    return model
