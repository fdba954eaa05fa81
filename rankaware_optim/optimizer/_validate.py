"""What an optimizer may be built from: classes by name, and what is refused before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from .._checks import check_lr, plain_lr
from .._optimizer_classes import get_optimizer_class
from ..errors import OptimizerError
from ._param_groups import UserGroup

__all__ = [
    "base_lr",
    "model_of",
    "native_class",
    "refuse_beside_recipe",
    "refuse_groups",
    "refuse_rateless",
    "refuse_settings",
]


def model_of(params: Any, model: nn.Module | None) -> nn.Module:
    found = params if isinstance(params, nn.Module) else model
    if not isinstance(found, nn.Module):
        raise OptimizerError(
            "Parameters alone do not say which of them are LoRA factors.",
            "Give the model: as the first argument, or as model= beside parameters or an optimizer.",
        )
    return found


def native_class(built: Optimizer | None, optimizer: type[Optimizer] | str | None) -> type[Optimizer]:
    if built is None and optimizer is None:
        raise OptimizerError("No optimizer was named.", "Give a class, such as RankAwareOptimizer(model, AdamW, ...).")
    if built is not None and optimizer is not None:
        raise OptimizerError("Both a built optimizer and a class were given.", "Give one of the two.")
    native = type(built) if built is not None else get_optimizer_class(optimizer)  # type: ignore[arg-type]
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError("This optimizer is rank-aware already.", "Use it as it is.")
    if built is not None and hasattr(built.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "A scheduler was built on this optimizer and holds its old groups.",
            "Wrap the optimizer first, then build the scheduler.",
        )
    if built is not None:
        _refuse_snapshots(built)
    _refuse_kind(native, built)
    return native


def _refuse_snapshots(built: Optimizer) -> None:
    """AdaBound keeps its groups' rates in a list: groups added behind its back would never be stepped."""
    count = len(built.param_groups)
    for name, value in vars(built).items():
        if name != "param_groups" and isinstance(value, (list, tuple)) and len(value) == count:
            raise OptimizerError(
                f"{type(built).__name__} keeps {name} by group from when it was built, so it cannot be regrouped.",
                "Give the class and its settings instead of the instance.",
            )


def refuse_beside_recipe(**given: object) -> None:
    for name in (name for name, value in given.items() if value is not None):
        raise OptimizerError(f"Both recipe= and {name}= were given.", "A recipe holds all three: give it alone.")


def refuse_settings(settings: Mapping[str, Any]) -> NoReturn:
    name = next(iter(settings), "lr")
    raise OptimizerError(f"{name}= was given for an optimizer that is built already.", "Give it when building it.")


def base_lr(native: type[Optimizer], built: Optimizer | None, lr: Any) -> Any:
    """The base rate, checked: a number, or a tensor as given; None leaves it to the optimizer's own default."""
    if lr is None and built is None:
        default = inspect.signature(native).parameters.get("lr")
        if default is not None and isinstance(default.default, (int, float)):
            return None
        raise OptimizerError(f"{native.__name__} has no default learning rate.", "Give lr=.")
    if built is not None:
        refuse_rateless(built)
    for group in built.param_groups if built is not None and lr is None else ({"lr": lr},):
        check_lr(group["lr"])
    return plain_lr(lr)


def refuse_rateless(opt: Optimizer) -> None:
    if any("lr" not in group for group in opt.param_groups):
        raise OptimizerError(
            f"{type(opt).__name__} keeps no rate in its groups, so none can be set by rank.",
            "Use it unwrapped, or choose another optimizer.",
        )


# Optimizers that cannot have a rate per group, by class name, with the reason.
_ONE_RATE = {
    "LBFGS": "takes one parameter group only",
    "Prodigy": "estimates one rate for all groups itself",
    "DAdaptAdam": "estimates one rate for all groups itself",
    "DAdaptSGD": "estimates one rate for all groups itself",
    "DAdaptAdaGrad": "estimates one rate for all groups itself",
    "DAdaptLion": "estimates one rate for all groups itself",
    "DAdaptAdan": "estimates one rate for all groups itself",
    "LoRARite": "steps A and B as one pair out of one group",
    "LOMO": "steps inside the backward pass with one rate",
    "AdaLOMO": "steps inside the backward pass with one rate",
}


def _refuse_kind(native: type[Optimizer], built: Optimizer | None) -> None:
    """Refuse what cannot have a rate per rank, and what holds another optimizer whose groups ours would not be."""
    for base in native.__mro__:
        if base.__name__ in _ONE_RATE:
            raise OptimizerError(
                f"{native.__name__} {_ONE_RATE[base.__name__]}, so it cannot have a rate per rank.",
                "Use it unwrapped, or choose another optimizer.",
            )
    held = any(isinstance(value, Optimizer) for value in vars(built).values()) if built is not None else False
    if held or {"optimizer", "base_optimizer", "optimizer_class"} & inspect.signature(native).parameters.keys():
        raise OptimizerError(
            f"{native.__name__} holds another optimizer, whose groups would stay as they are.",
            "Wrap the inner one: RankAwareOptimizer(model, AdamW, ...), then put the outer one around it.",
        )
    if built is None and next(iter(inspect.signature(native).parameters), None) == "model":
        raise OptimizerError(
            f"{native.__name__} takes a model and cuts it into groups itself.",
            f"Build it, then wrap it: RankAwareOptimizer({native.__name__}(model, ...), model=model).",
        )


def refuse_groups(native: type[Optimizer], groups: Iterable[UserGroup], held: Iterable[int] = ()) -> None:
    """Refuse parameters that the optimizer would refuse itself, or that it has already, naming them."""
    named = [pair for group in groups for pair in group.named]
    known = set(held)
    twice = [name for name, p in named if id(p) in known]
    if twice:
        raise OptimizerError(f"The parameter {twice[0]} is in this optimizer already.", "Add each parameter once.")
    other = [name for name, p in named if p.dim() != 2] if native.__module__.startswith("torch.optim") else []
    if native.__name__ == "Muon" and other:
        raise OptimizerError(
            f"Muon takes matrices only, and {len(other)} parameters are none, such as {other[0]}.",
            "Give Muon groups of the 2-D parameters with model=, and the rest to another optimizer.",
        )
