"""Checks of the arguments before anything is changed, and of the parameters at a step."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import check_lr
from .._optimizers import (
    defaults_of,
    get_optimizer_class,
    known_optimizer,
    optimizer_family,
)
from .._types import Reference, Survey
from .._warn import warn
from ..errors import OptimizerError
from ..inspection import ReferenceLike, Walk, as_reference, pairs_of, walk
from ..laws import DEFAULT_LAW, Law
from ..recipe import (
    SAME_UPDATES,
    Recipe,
    configuration_of,
    differences,
    is_for,
    other_rates_on,
    plain_value,
    rate,
    settings_of,
    warn_of,
)
from ._param_groups import Group, Groups, Native, UserGroup, named_params, params_in
from ._plan import PlanOptions, RecipeUse, Settings

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


# --- the optimizer --------------------------------------------------------------------------------


def native_class(
    built: Optimizer | None,
    optimizer: type[Optimizer] | str | None,
    lr: object,
    settings: Settings,
) -> Native:
    """Return the class to wrap: that of the built optimizer, or the given one. Raise if it cannot
    have group rates, or a rate or settings are given for an optimizer that is built already.
    """
    native = _class_of(built, optimizer, lr, settings)
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError(
            "This optimizer is rank-aware already.", "Use it as it is."
        )
    if built is not None:
        _refuse_old_groups(built)
    why = known_optimizer(native)[1].one_rate
    if why:
        raise OptimizerError(
            f"{native.__name__} {why}, so it cannot have a rate per rank.",
            "Use it unwrapped, or choose another optimizer.",
        )
    takes = list(inspect.signature(native).parameters)
    inner = {"optimizer", "base_optimizer", "optimizer_class"}.intersection(takes)
    attributes = [] if built is None else vars(built).values()
    if inner or any(isinstance(value, Optimizer) for value in attributes):
        raise OptimizerError(
            f"{native.__name__} wraps another optimizer, whose groups would not change.",
            "Wrap the inner one first: RankAwareOptimizer(model, AdamW, ...). Then wrap the"
            " result.",
        )
    if built is None and takes[:1] == ["model"]:
        raise OptimizerError(
            f"{native.__name__} takes a model and makes its groups itself.",
            f"Build it, then wrap it: RankAwareOptimizer({native.__name__}(model, ...),"
            " model=model).",
        )
    return native


# Keywords that this class had, or that a user may know from there.
_GONE = (
    "apply_settings",
    "native_type",
    "on_rank_change",
    "per_layer_width",
    "scale_weight_decay",
    "strict",
    "warmup_share",
)


def refuse_keywords(native: Native, settings: Settings, ours: Collection[str]) -> None:
    """Raise for a keyword that went, or that is nearly one of `ours`, unless the class has an
    argument of that name. A class that takes `**kwargs` would drop it silently.
    """
    for name in settings.keys() - inspect.signature(native).parameters.keys():
        near = get_close_matches(name, ours, n=1, cutoff=0.8)
        if near or name in _GONE:
            raise OptimizerError(
                f"{name}= is an argument neither of RankAwareOptimizer nor of"
                f" {native.__name__}.",
                f"Give {near[0]}=." if near else "Leave it out.",
            )


def _class_of(
    built: Optimizer | None,
    optimizer: type[Optimizer] | str | None,
    lr: object,
    settings: Settings,
) -> Native:
    if built is None:
        if optimizer is not None:
            return get_optimizer_class(optimizer)
        raise OptimizerError(
            "No optimizer was given.",
            "Give a class, such as RankAwareOptimizer(model, AdamW, ...).",
        )
    if optimizer is not None:
        raise OptimizerError(
            "Both a built optimizer and a class were given.", "Give one of the two."
        )
    if settings or lr is not None:
        name = next(iter(settings), "lr")
        raise OptimizerError(
            f"{name}= was given for an optimizer that is built already.",
            "Give it when building it.",
        )
    return type(built)


def _refuse_old_groups(built: Optimizer) -> None:
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
        if (
            name != "param_groups"
            and isinstance(value, (list, tuple))
            and len(value) == count
        ):
            raise OptimizerError(
                f"{type(built).__name__} keeps {name} for each of its first groups, so it cannot be"
                " regrouped.",
                "Give the class and its settings instead of the instance.",
            )


def refuse_inside_zero() -> None:
    """Raise if the caller of our caller is `ZeroRedundancyOptimizer`, which has one group for each
    group of its inner optimizer.
    """
    if sys._getframe(2).f_globals.get("__name__") == _ZERO:
        raise OptimizerError(
            "ZeroRedundancyOptimizer cannot hold a RankAwareOptimizer, which splits groups.",
            "Give it the native class and groups made by rank_aware_param_groups(model, ...,"
            " named=False), which hold multiplied rates.",
        )


def check_base_lr(
    native: Native,
    built: Optimizer | None,
    lr: Any,
    groups: Iterable[UserGroup],
    options: PlanOptions,
) -> None:
    """Check the given base rate, a number or a tensor, or else that the optimizer or its groups
    have rates.

    The optimizer's default was not tuned. It is refused where a reference says that it was, and
    warned of elsewhere.
    """
    if lr is not None:
        check_lr(lr)
    if built is not None:
        refuse_rateless(built)
    if built is not None or lr is not None:
        return
    default = defaults_of(native).get("lr")
    if not isinstance(default, (int, float)):
        raise OptimizerError(
            f"{native.__name__} has no default learning rate.", "Give lr=."
        )
    without = [group.names for group in groups if "lr" not in group.options]
    if all(options.rate_of(name) is not None for name in chain(*without)):
        return
    if options.tuned_at is not None:
        raise OptimizerError(
            f"tuned_at= was given without lr=, but {native.__name__}'s default, {default}, is not"
            " tuned.",
            "Give the tuned rate as lr=, or leave tuned_at= out.",
        )
    warn(
        f"No lr= was given, so this trains at {native.__name__}'s default rate, {default:g}, which"
        " nobody tuned for this model. Give lr= with tuned_at=, the rank and alpha at which it was"
        " tuned, or recipe=."
    )


def refuse_rateless(opt: Optimizer) -> None:
    if any("lr" not in group for group in opt.param_groups):
        raise OptimizerError(
            f"{type(opt).__name__} has no rate in its groups, so none can be set by rank.",
            "Use it unwrapped, or choose another optimizer.",
        )


def refuse_groups(
    native: Native, groups: Iterable[UserGroup], present: Iterable[int] = ()
) -> None:
    """Raise, with their names, for parameters that the optimizer does not accept or already has.

    present: the ids of those that it has.
    """
    present, odd = set(present), []
    for group in groups:
        for name, param in group.named:
            if id(param) in present:
                raise OptimizerError(
                    f"The parameter {name} is in this optimizer already.",
                    "Add each parameter once.",
                )
            if param.dim() != 2:
                odd.append(name)
    if (
        odd
        and native.__name__ == "Muon"
        and native.__module__.startswith("torch.optim")
    ):
        raise OptimizerError(
            f"Muon takes only matrices, but {len(odd)} parameters are not, such as {odd[0]}.",
            "Give Muon groups of the 2-D parameters with model=, and the rest to another"
            " optimizer.",
        )


# --- the recipe -----------------------------------------------------------------------------------


def read_recipe(
    recipe: Recipe | str | os.PathLike[str] | None,
    horizon: Settings,
    law: str | Law | None,
    tuned_at: ReferenceLike | None,
    lr: object,
) -> tuple[Recipe | None, str | Law, Reference | None]:
    """Return the recipe, and the law and the reference of the base rate: the recipe's, or else
    those given. Raise if something is given that a recipe includes, or that needs one.
    """
    if recipe is None:
        if horizon["steps"] is not None:
            raise OptimizerError(
                "steps= was given without recipe=, so it has no effect.",
                "Leave it out.",
            )
        reference = None if tuned_at is None else as_reference(tuned_at)
        return None, DEFAULT_LAW if law is None else law, reference
    for name, value in {"lr": lr, "tuned_at": tuned_at, "law": law}.items():
        if value is not None:
            raise OptimizerError(
                f"Both recipe= and {name}= were given.",
                "Give only the recipe, which includes it.",
            )
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return loaded, loaded.law, loaded.reference


def use_recipe(
    recipe: Recipe | None,
    survey: Survey,
    native: Native,
    settings: Settings,
    groups: Iterable[UserGroup],
    horizon: Settings,
) -> RecipeUse | None:
    """Move the recipe's rates to the run's steps. Warn once if the run differs from the recipe's
    trials.
    """
    if recipe is None:
        return None
    steps, batch = horizon["steps"], horizon["batch"]
    batch = None if recipe.batch is None else batch
    at = configuration_of(recipe, survey)
    own, by_steps = rate(recipe, at, steps, batch), 1.0
    warn_of(recipe, rate(recipe, at))  # other steps are said below
    if steps is not None:
        by_steps = rate(recipe, at, steps).lr / rate(recipe, at).lr
    in_force = _settings_in_force(
        recipe, survey, {**defaults_of(native), **settings}, groups
    )
    notes = _differing(recipe, native, in_force, horizon)
    if notes:
        warn(notes[0])
    if is_for(recipe, native):
        at_steps = steps or recipe.steps or "unknown"
        at_batch = batch or recipe.batch or "unknown"
        notes.append(
            f"recipe {recipe.name!r}: the best rate lies between {own.low:.3g} and {own.high:.3g}"
            f" with 90 %, for {at_steps} steps at batch {at_batch}."
        )
        notes += own.notes
    return RecipeUse(recipe, tuple(notes), by_steps, other_rates_on(recipe, survey))


def _settings_in_force(
    recipe: Recipe, survey: Survey, base: Settings, groups: Iterable[UserGroup]
) -> Settings:
    """Return those of the recipe's settings that the factors train with, or `base`."""
    names = [name for name in recipe.settings if name in base.keys() - SAME_UPDATES]
    factors = {f.name for f in survey.factors}
    own = [g.options for g in groups if not factors.isdisjoint(g.names)]
    return settings_of([{**base, **options} for options in own or [{}]], names)


def _differing(
    recipe: Recipe,
    native: Native,
    settings: Settings,
    horizon: Settings,
) -> list[str]:
    """Return how the run differs from the recipe's trials, and what to do about it; empty if it
    does not.
    """
    trials, run = plain_value(recipe.settings), dict(settings)
    if not is_for(recipe, native):
        theirs, ours = recipe.optimizer.rpartition(".")[2], native.__name__
        trials = {"optimizer": theirs, "family": known_optimizer(theirs)[1].family}
        run = {"optimizer": ours, "family": optimizer_family(native, settings)}
        cure = f"Its rates are for {theirs} and not for {ours}: calibrate with {ours}."
    elif differences(trials, run):
        cure = "Its rates belong to these settings: give **recipe.settings."
    else:
        cure = "Its rates belong to these settings, and are less certain for others."
    of_trials = {"batch": recipe.batch, "steps": recipe.steps}
    for name, value in of_trials.items():
        if value is not None and horizon[name] is not None:
            trials[name], run[name] = value, horizon[name]
    words = differences(trials, run)
    return [f"Recipe {recipe.name!r} was made with {words}. {cure}"] if words else []


# --- the parameters at a step ---------------------------------------------------------------------


def check_parameters(
    opt: Any, model: nn.Module | None, others: Iterable[Optimizer]
) -> None:
    """Check that the parameters held here get the gradients of the model, so that training does not
    fail silently.

    fully_shard and a re-created adapter replace the tensors under the names held here. Activating
    another adapter leaves those held here without gradients. A dry step without rates, as
    torch.distributed.checkpoint makes, is not checked, nor is one without any gradient, nor are
    parameters that another RankAwareOptimizer holds.

    others: the other RankAwareOptimizers of this process.
    """
    groups = opt.param_groups
    if not any(float(group["lr"]) for group in groups):
        return
    if model is None or all(map(_is_graded, params_in(groups))):
        opt._rankaware_unchecked = False
        return
    walked = walk(model)
    lost = {name: p for name, p in walked.parameters if _is_graded(p)}
    opt._rankaware_unchecked &= not lost
    for holder in (opt, *others):
        held = set(params_in(holder.param_groups))
        lost = {name: p for name, p in lost.items() if p not in held}
    _refuse_lost(groups, walked, lost)


def _refuse_lost(
    groups: Groups, walked: Walk, lost: Mapping[str, nn.Parameter]
) -> None:
    """Raise if `lost` parameters, which no optimizer has, train in place of those in `groups`."""
    if not lost:
        return
    for name, param in named_params(groups):
        if name in lost and param.grad is None:
            raise _lost(name, "whose tensor of that name has none")
    adapters, params = _adapters_in(lost, walked), params_in(groups)
    # FSDP1 flattens them
    gone = set(params).isdisjoint(dict(walked.parameters).values())
    if _is_idle(params) and (adapters or gone):
        raise _lost([*adapters, *lost][0], "none of whose parameters has one")
    if adapters and _is_idle(params_in(filter(_is_of_adapter, groups))):
        warn(
            f"None of this optimizer's adapters has a gradient, but {adapters[0]}, which it does"
            " not hold, has one and does not train. Build the optimizer after the adapter was"
            " added and activated."
        )


def _is_of_adapter(group: Group) -> bool:
    return group.get("lora_role") in ("A", "B")


def _adapters_in(lost: Mapping[str, nn.Parameter], walked: Walk) -> list[str]:
    """Return the names of those that are LoRA factors."""
    halves: set[torch.Tensor] = set()
    for pair in pairs_of(walked.modules):
        halves |= {pair.a.tensor, pair.b.tensor}
    return [name for name, p in lost.items() if p in halves]


def _is_graded(param: torch.Tensor) -> bool:
    return param.grad is not None


def _is_idle(params: Collection[torch.Tensor]) -> bool:
    """Return whether there are parameters, none of which has a gradient."""
    return bool(params) and not any(map(_is_graded, params))


def _lost(name: str, what: str) -> OptimizerError:
    return OptimizerError(
        f"The model's {name} has a gradient and is not held by this optimizer, {what}: the model's"
        " parameters were replaced, or another adapter was activated, after it was built.",
        "Shard or wrap the model first (fully_shard, FSDP), with its adapters, then build the"
        " optimizer.",
    )
