"""Checks of the arguments of an optimizer, before anything is changed."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from .._checks import check_lr, is_within, range_of, shown
from .._optimizers import defaults_of, get_optimizer_class, known_optimizer
from .._types import Reference, Survey
from ..errors import OptimizerError
from ..inspection import ReferenceLike, as_reference
from ..laws import DEFAULT_LAW, Law
from ..recipe import SAME_UPDATES, Recipe, is_for, resolve_recipe, settings_of
from ._param_groups import UserGroup
from ._recipe_use import Run

_ZERO = (
    "Give it the native class and groups made by rank_aware_param_groups(model, ..., named=False), "
    "which hold multiplied rates."
)


def native_class(
    built: Optimizer | None, optimizer: type[Optimizer] | str | None
) -> type[Optimizer]:
    """Return the class to wrap: that of the built optimizer, or the given one. Raise if it cannot
    have group rates.
    """
    if built is not None and optimizer is not None:
        raise OptimizerError(
            "Both a built optimizer and a class were given.", "Give one of the two."
        )
    if built is not None:
        native = type(built)
    elif optimizer is not None:
        native = get_optimizer_class(optimizer)
    else:
        raise OptimizerError(
            "No optimizer was given.",
            "Give a class, such as RankAwareOptimizer(model, AdamW, ...).",
        )
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError("This optimizer is rank-aware already.", "Use it as it is.")
    if built is not None:
        _refuse_held_groups(built)
    why = known_optimizer(native)[1].one_rate
    if why:
        raise OptimizerError(
            f"{native.__name__} {why}, so it cannot have a rate per rank.",
            "Use it unwrapped, or choose another optimizer.",
        )
    takes = inspect.signature(native).parameters.keys()
    held = built is not None and any(isinstance(value, Optimizer) for value in vars(built).values())
    if held or {"optimizer", "base_optimizer", "optimizer_class"} & takes:
        raise OptimizerError(
            f"{native.__name__} wraps another optimizer, whose groups would not change.",
            "Wrap the inner one first: RankAwareOptimizer(model, AdamW, ...). Then wrap the"
            " result.",
        )
    if built is None and next(iter(takes), None) == "model":
        raise OptimizerError(
            f"{native.__name__} takes a model and makes its groups itself.",
            f"Build it, then wrap it: RankAwareOptimizer({native.__name__}(model, ...),"
            " model=model).",
        )
    return native


def refuse_inside_zero() -> None:
    """Raise inside `ZeroRedundancyOptimizer`, which has one group for each group of its inner
    optimizer.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise OptimizerError(
                "ZeroRedundancyOptimizer cannot hold a RankAwareOptimizer, which splits groups.",
                _ZERO,
            )


def _refuse_held_groups(built: Optimizer) -> None:
    """Raise if something else holds the instance's old groups: a scheduler, or a list with one
    entry per group.

    AdaBound, for example, keeps its groups' rates in a list. Groups that are added later would
    never be stepped.
    """
    if hasattr(built.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "A scheduler was built on this optimizer and holds its old groups.",
            "Wrap the optimizer first, then build the scheduler.",
        )
    count = len(built.param_groups)
    for name, value in vars(built).items():
        if name != "param_groups" and isinstance(value, (list, tuple)) and len(value) == count:
            raise OptimizerError(
                f"{type(built).__name__} keeps {name} for each of its first groups, so it cannot be"
                " regrouped.",
                "Give the class and its settings instead of the instance.",
            )


def from_recipe(
    recipe: Recipe | str | os.PathLike[str] | None,
    lr: Any,
    tuned_at: ReferenceLike | None,
    law: str | Law | None,
) -> tuple[Recipe | None, Any, Reference | None, str | Law]:
    """Return the recipe with its base rate, reference and law; without a recipe, those that were
    given.
    """
    if recipe is None:
        at = None if tuned_at is None else as_reference(tuned_at)
        return None, lr, at, DEFAULT_LAW if law is None else law
    for name, value in (("lr", lr), ("tuned_at", tuned_at), ("law", law)):
        if value is not None:
            raise OptimizerError(
                f"Both recipe= and {name}= were given.", "Give only the recipe, which includes it."
            )
    loaded = resolve_recipe(recipe)
    return (
        loaded,
        loaded.lr,
        replace(loaded.reference, batch=loaded.reference.batch or loaded.batch),
        loaded.law,
    )


def refuse_settings(built: Optimizer | None, lr: object, settings: Mapping[str, Any]) -> None:
    """Raise if settings or a rate are given for an optimizer that is built already."""
    if built is not None and (settings or lr is not None):
        name = next(iter(settings), "lr")
        raise OptimizerError(
            f"{name}= was given for an optimizer that is built already.",
            "Give it when building it.",
        )


def run_of(
    recipe: Recipe | None,
    native: type[Optimizer],
    given: Mapping[str, Any],
    groups: Iterable[UserGroup],
    survey: Survey,
    **horizon: Any,
) -> Run | None:
    """Return the run that uses a recipe, with the factors' settings: their group's, the given ones,
    or the defaults.

    Raises:
        OptimizerError: steps or a warm-up are given without a recipe, or the warm-up is not a
            share.
    """
    share = horizon["warmup_share"]
    if share is not None and not is_within("share", share):
        raise OptimizerError(
            f"warmup_share is {shown(share)}.", f"Give {range_of('share')}, or leave it out."
        )
    if recipe is None:
        for name in ("steps", "warmup_share"):
            if horizon[name] is not None:
                raise OptimizerError(
                    f"{name}= was given without recipe=, so it has no effect.", "Leave it out."
                )
        return None
    base, factors = {**defaults_of(native), **given}, {f.name for f in survey.factors}
    names = [name for name in recipe.settings if name in base and name not in SAME_UPDATES]
    held = [{**base, **group.options} for group in groups if not factors.isdisjoint(group.names)]
    return Run(native, settings_of(held or [base], names), **horizon)


def applied_settings(
    recipe: Recipe | None, native: type[Optimizer], built: Optimizer | None
) -> dict[str, Any]:
    """Return the recipe's settings that the optimizer accepts.

    Raises:
        OptimizerError: there is no recipe, it is for another optimizer, or the optimizer is built
            already.
    """
    if recipe is None:
        raise OptimizerError(
            "apply_settings=True uses a recipe's settings, but none was given.", "Give recipe=."
        )
    if built is not None:
        raise OptimizerError(
            "apply_settings=True was given for an optimizer that is built already.",
            f"Give the class: RankAwareOptimizer(model, {native.__name__}, ...).",
        )
    if not is_for(recipe, native):
        raise OptimizerError(
            f"Recipe {recipe.name!r} was made with {recipe.optimizer}, whose settings do not fit"
            f" {native.__name__}.",
            "Use the recipe's optimizer, or leave apply_settings= out.",
        )
    own = {
        name: default
        for name, default in defaults_of(native).items()
        if name not in ("lr", *SAME_UPDATES)
    }
    fitting = {
        name: value
        for name, value in recipe.settings.items()
        if name in own and _fits(value, own[name])
    }
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fitting.items()
    }


def _fits(value: Any, default: Any) -> bool:
    """Return whether a recipe's value can be a setting's. It cannot if it is the repr of an object."""
    if isinstance(value, (list, tuple)):  # a tuple, or the values of several groups
        return isinstance(default, (list, tuple)) and len(value) == len(default)
    if isinstance(value, str):
        return isinstance(default, str) or (default is None and value.isidentifier())
    return default is None or isinstance(default, (bool, int, float))


def check_base_lr(
    native: type[Optimizer], built: Optimizer | None, lr: Any, tuned: Iterable[UserGroup]
) -> None:
    """Check the given base rate, a number or a tensor, or else the rates of the optimizer and its
    groups.

    tuned: the groups for which a reference is given. Each needs its own rate or `lr`, since the
    optimizer's default was not tuned for that reference.
    """
    if lr is not None:
        check_lr(lr)
    if built is not None:
        refuse_rateless(built)
        for group in built.param_groups if lr is None else ():
            check_lr(group["lr"])
    elif lr is None:
        default = inspect.signature(native).parameters.get("lr")
        if default is None or not isinstance(default.default, (int, float)):
            raise OptimizerError(f"{native.__name__} has no default learning rate.", "Give lr=.")
        if not all("lr" in group.options for group in tuned if group.named):
            raise OptimizerError(
                f"tuned_at= was given without lr=, but {native.__name__}'s default,"
                f" {default.default}, is not tuned.",
                "Give the tuned rate as lr=, or leave tuned_at= out.",
            )


def refuse_rateless(opt: Optimizer) -> None:
    if any("lr" not in group for group in opt.param_groups):
        raise OptimizerError(
            f"{type(opt).__name__} has no rate in its groups, so none can be set by rank.",
            "Use it unwrapped, or choose another optimizer.",
        )


def refuse_groups(
    native: type[Optimizer], groups: Iterable[UserGroup], held: Iterable[int] = ()
) -> None:
    """Raise, with their names, for parameters that the optimizer does not accept or already has."""
    named = [pair for group in groups for pair in group.named]
    known = set(held)
    twice = [name for name, p in named if id(p) in known]
    if twice:
        raise OptimizerError(
            f"The parameter {twice[0]} is in this optimizer already.", "Add each parameter once."
        )
    other = (
        [name for name, p in named if p.dim() != 2]
        if native.__module__.startswith("torch.optim")
        else []
    )
    if native.__name__ == "Muon" and other:
        raise OptimizerError(
            f"Muon takes only matrices, but {len(other)} parameters are not, such as {other[0]}.",
            "Give Muon groups of the 2-D parameters with model=, and the rest to another"
            " optimizer.",
        )
