"""Torch optimizer classes, found by name."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import OptimizerError

if TYPE_CHECKING:
    from torch.optim import Optimizer

_NO_CLASS = (
    "Optimizer",
    "RankAwareOptimizer",
)  # base class and wrapper, which are not optimizers by themselves


def get_optimizer_class(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """Return a torch optimizer class.

    Args:
        optimizer: the class, a name in torch.optim in upper or lower case, "package:Class", or
            "module.Class" as in a recipe.

    Raises:
        OptimizerError: there is no such class.

    >>> [get_optimizer_class(name).__name__ for name in ("adamw", "torch.optim.AdamW")]
    ['AdamW', 'AdamW']
    """
    from torch.optim import Optimizer

    found: Any = optimizer
    if isinstance(optimizer, str):
        package, _, name = optimizer.rpartition(":" if ":" in optimizer else ".")
        found = _find_class(package or "torch.optim", name)
    if (
        not isinstance(found, type)
        or not issubclass(found, Optimizer)
        or found.__name__ in _NO_CLASS
    ):
        raise OptimizerError(
            f"{found!r} is not a torch optimizer class.", "Give a class such as torch.optim.AdamW."
        )
    return found


def defaults_of(function: Any) -> dict[str, Any]:
    """Return the default values of a function's or class's arguments; empty if its signature cannot
    be read.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _find_class(package: str, name: str) -> type[Optimizer]:
    from torch.optim import Optimizer

    try:
        module = import_module(package)
    except (
        Exception,
        SystemExit,
    ) as error:  # a third-party module may raise anything on import, or exit
        raise OptimizerError(
            f"The package {package!r} cannot be imported: {error}.", "Install it, or fix it."
        ) from error
    members = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    classes = {key.lower(): value for key, value in members.items() if issubclass(value, Optimizer)}
    if name.lower() not in classes:
        known = ", ".join(sorted(value.__name__ for value in set(classes.values()) - {Optimizer}))
        raise OptimizerError(
            f"Unknown optimizer {name!r} in {package}.", f"Give one of {known}, or 'package:Class'."
        )
    return classes[name.lower()]
