"""Several models that train together, seen as one model."""

from __future__ import annotations

from typing import Any

from torch import nn


class Models(nn.ModuleList):
    """Several models as one module. A parameter's name begins with the number of its model."""


def as_one_model(model: Any) -> Any:
    """Return a list of models as one module, and anything else unchanged."""
    listed = isinstance(model, (list, tuple)) and len(model) > 0
    if listed and all(isinstance(each, nn.Module) for each in model):
        return Models(model)
    return model
