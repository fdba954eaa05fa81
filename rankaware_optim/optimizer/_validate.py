"""Checks of the arguments before anything is changed, and of the parameters at a step."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any, NamedTuple

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
from ..inspection import ReferenceLike, Walk, as_reference, factor_tensors, walk
from ..laws import DEFAULT_LAW, Law
from ..recipe import (
    SAME_UPDATES,
    Recipe,
    base_lr,
    configuration_of,
    differences,
    is_for,
    on_model,
    other_rates_on,
    plain_value,
    rate,
    settings_of,
    warn_of,
)
from ._param_groups import Groups, Native, UserGroup, named_params, params_in
from ._plan import PlanOptions, RecipeUse, Settings

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


# --- the optimizer --------------------------------------------------------------------------------


class Source(NamedTuple):
    """What is wrapped: the class, the optimizer if it is built already, the user's parameters, and
    the settings of all groups.
    """

    native: Native
    built: Optimizer | None
    params: Any
    settings: Settings


def read_source(
    params: Any,
    optimizer: type[Optimizer] | str | None,
    lr: object,
    settings: Settings,
    ours: Collection[str],
) -> Source:
    """Return what is wrapped. Raise if it cannot have group rates, or if an argument is not one of
    `ours` nor of the class.
    """
    built = params if isinstance(params, Optimizer) else None
    given = next(iter(settings), None if lr is None else "lr")
    _refuse(
        [
            (
                built is None and optimizer is None,
                "No optimizer was given.",
                "Give a class, such as RankAwareOptimizer(model, AdamW, ...).",
            ),
            (
                built is not None and optimizer is not None,
                "Both a built optimizer and a class were given.",
                "Give one of the two.",
            ),
            (
                built is not None and given is not None,
                f"{given}= was given for an optimizer that is built already.",
                "Give it when building it.",
            ),
        ]
    )
    if built is not None:
        native: Native = type(built)
        source = Source(native, built, built.param_groups, built.defaults)
    else:
        native = get_optimizer_class(optimizer or "")
        source = Source(native, None, params, settings)
    refuse_one_rate(native)
    _refuse(_not_wrapped(native, built))
    if built is not None:
        refuse_rateless(built)
    _refuse_keywords(native, settings, ours)
    return source


_Refusal = tuple[bool, str, str]  # whether it applies, cause and cure


def _refuse(refusals: Iterable[_Refusal]) -> None:
    for applies, cause, cure in refusals:
        if applies:
            raise OptimizerError(cause, cure)


def _list_by_group(built: Optimizer) -> str:
    """Return the name of a list with an entry per group, as AdaBound keeps its groups' rates; ""
    without one. Groups that are added later would never be stepped.
    """
    for name, value in vars(built).items():
        of_groups = isinstance(value, (list, tuple)) and name != "param_groups"
        if of_groups and len(value) == len(built.param_groups):
            return name
    return ""


def _not_wrapped(native: Native, built: Optimizer | None) -> Iterator[_Refusal]:
    """Yield what cannot be wrapped."""
    name = native.__name__
    takes = list(inspect.signature(native).parameters)
    attributes = {} if built is None else vars(built)
    kept = "" if built is None else _list_by_group(built)
    inner = {"optimizer", "base_optimizer", "optimizer_class"}.intersection(takes)
    holds = any(isinstance(value, Optimizer) for value in attributes.values())
    yield (
        hasattr(native, "_rankaware_native"),
        "This optimizer is rank-aware already.",
        "Use it as it is.",
    )
    yield (
        built is not None and hasattr(built.step, "_wrapped_by_lr_sched"),
        "A scheduler was built on this optimizer and holds its old groups.",
        "Wrap the optimizer first, then build the scheduler.",
    )
    yield (
        "step" in attributes,
        f"{name} has a step of its own on the instance, which would train without multipliers.",
        "Wrap the optimizer before anything replaces its step.",
    )
    yield (
        bool(kept),
        f"{name} keeps {kept} for each of its first groups, so it cannot be regrouped.",
        "Give the class and its settings instead of the instance.",
    )
    yield (
        bool(inner) or holds,
        f"{name} wraps another optimizer, whose groups would not change.",
        "Wrap the inner one first: RankAwareOptimizer(model, AdamW, ...). Then wrap the result.",
    )
    yield (
        built is None and takes[:1] == ["model"],
        f"{name} takes a model and makes its groups itself.",
        f"Build it, then wrap it: RankAwareOptimizer({name}(model, ...), model=model).",
    )


def refuse_one_rate(native: Native) -> None:
    """Raise for an optimizer that cannot have a rate for each group."""
    reason = known_optimizer(native)[1].one_rate
    if reason:
        raise OptimizerError(
            f"{native.__name__} {reason}, so it cannot have a rate per rank.",
            "Use it unwrapped, or choose another optimizer.",
        )


def _refuse_keywords(native: Native, settings: Settings, ours: Collection[str]) -> None:
    """Raise for a keyword that the class does not take. One that takes `**kwargs` would drop it
    silently: there, raise for what is nearly one of `ours`.
    """
    theirs = inspect.signature(native).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in theirs.values())
    known, alike = set(ours), 0.8
    if not takes_any:
        known, alike = {*ours, *theirs} - {"cls", "params", "settings"}, 0.7
    for name in settings.keys() - theirs.keys():
        near = get_close_matches(name, known, 1, alike)
        if near or not takes_any:
            raise OptimizerError(
                f"{name}= is an argument neither of RankAwareOptimizer nor of"
                f" {native.__name__}.",
                f"Give {near[0]}=." if near else "Leave it out.",
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
    source: Source, lr: Any, groups: Iterable[UserGroup], options: PlanOptions
) -> None:
    """Check the given base rate, a number or a tensor, or else that the optimizer or its groups
    have rates.

    The optimizer's default was not tuned. It is refused where a reference says that it was, and
    warned of elsewhere.
    """
    name = source.native.__name__
    if lr is not None:
        check_lr(lr)
    if source.built is not None or lr is not None:
        return
    default = defaults_of(source.native).get("lr")
    if not isinstance(default, (int, float)):
        raise OptimizerError(f"{name} has no default learning rate.", "Give lr=.")
    without = [group.names for group in groups if "lr" not in group.options]
    if all(options.rate_of(each) is not None for each in chain(*without)):
        return
    if options.tuned_at is not None:
        raise OptimizerError(
            f"tuned_at= was given without lr=, but {name}'s default, {default}, is not tuned.",
            "Give the tuned rate as lr=, or leave tuned_at= out.",
        )
    warn(
        f"No lr= was given, so this trains at {name}'s default rate, {default:g}, which nobody"
        " tuned for this model. Give lr= with tuned_at=, the rank and alpha at which it was tuned,"
        " or recipe=."
    )


def refuse_rateless(opt: Optimizer) -> None:
    """Raise if an optimizer has no rate in its groups."""
    if any("lr" not in group for group in opt.param_groups):
        raise OptimizerError(
            f"{type(opt).__name__} has no rate in its groups, so none can be set by rank.",
            "Use it unwrapped, or choose another optimizer.",
        )


def settings_of_built(opt: Optimizer) -> Settings:
    """Return the settings of a built optimizer, some of which are attributes."""
    return {**vars(opt), **opt.defaults}


def refuse_groups(
    native: Native,
    groups: Iterable[UserGroup],
    settings: Settings,
    present: Iterable[int] = (),
) -> None:
    """Raise for groups whose rates would train nothing, and, with their names, for parameters that
    the optimizer does not accept or already has.

    settings: those in force for all groups. present: the ids of the parameters that it has.
    """
    present, odd = set(present), []
    own = known_optimizer(native)[1].own_rate
    for group in groups:
        value = own and {**settings, **group.options}.get(own.setting, own.off)
        if own and value != own.off:
            raise OptimizerError(
                f"{native.__name__} makes its rates itself with {own.setting}={value!r}, so those"
                " given would train nothing.",
                f"Give {own.setting}={own.off!r}.",
            )
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
    steps: int | None,
    law: str | Law | None,
    tuned_at: ReferenceLike | None,
    lr: object,
) -> tuple[Recipe | None, str | Law, Reference | None]:
    """Return the recipe, and the law and the reference of the base rate: the recipe's, or else
    those given. Raise if something is given that a recipe includes, or that needs one.
    """
    if recipe is None:
        if steps is not None:
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
    recipe: Recipe,
    survey: Survey,
    source: Source,
    groups: Sequence[UserGroup],
    horizon: Settings,
) -> RecipeUse:
    """Move the recipe's rates to the run's steps. Warn if the model is another than the recipe's,
    and once if the run differs from its trials. The rates with which an optimizer was built are
    dropped, since the recipe's replace them.
    """
    for group in groups if source.built is not None else ():
        group.options.pop("lr", None)
    steps, native = horizon["steps"], source.native
    batch = None if recipe.batch is None else horizon["batch"]
    at, notes = configuration_of(recipe, survey), []
    recipe, strange = on_model(recipe, survey)
    if strange:
        warn(strange)
        notes.append(strange)
    here, by_steps = rate(recipe, at), 1.0
    warn_of(recipe, here)  # other steps are said below
    if steps is not None:
        by_steps = rate(recipe, at, steps).lr / here.lr
    in_force = _settings_in_force(recipe, survey, source, groups)
    if differing := _differing(recipe, native, in_force, horizon):
        warn(differing)
        notes.append(differing)
    if is_for(recipe, native):
        best = rate(recipe, at, steps, batch)
        notes.append(
            f"recipe {recipe.name!r}: the best rate lies between {best.low:.3g} and"
            f" {best.high:.3g} with 90 % at {best.configuration}."
        )
        notes += best.notes
    others = other_rates_on(recipe, survey)
    return RecipeUse(recipe, base_lr(recipe, at), tuple(notes), by_steps, others)


def _settings_in_force(
    recipe: Recipe, survey: Survey, source: Source, groups: Iterable[UserGroup]
) -> Settings:
    """Return those of the recipe's settings that the factors train with."""
    base = {**defaults_of(source.native), **source.settings}
    names = [name for name in recipe.settings if name in base.keys() - SAME_UPDATES]
    factors = {f.name for f in survey.factors}
    own = [g.options for g in groups if not factors.isdisjoint(g.names)]
    return settings_of([{**base, **options} for options in own or [{}]], names)


def _differing(
    recipe: Recipe,
    native: Native,
    settings: Settings,
    horizon: Settings,
) -> str:
    """Return how the run differs from the recipe's trials, and what to do about it; "" if it does
    not.
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
    return f"Recipe {recipe.name!r} was made with {words}. {cure}" if words else ""


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
    graded = [(name, p) for name, p in walked.parameters if _is_graded(p)]
    opt._rankaware_unchecked &= not graded
    held = set(params_in(chain(groups, *(other.param_groups for other in others))))
    lost = {name: p for name, p in graded if p not in held}
    if lost:
        _refuse_lost(groups, walked, lost)


def _refuse_lost(
    groups: Groups, walked: Walk, lost: Mapping[str, nn.Parameter]
) -> None:
    """Raise if `lost` parameters, which no optimizer has, train in place of those in `groups`."""
    for name, param in named_params(groups):
        if name in lost and param.grad is None:
            raise _lost(name, "whose tensor of that name has none")
    factors = factor_tensors(walked)
    adapters = [name for name, p in lost.items() if p in factors]
    params = params_in(groups)
    # FSDP1 flattens them
    gone = set(params).isdisjoint(dict(walked.parameters).values())
    if _is_idle(params) and (adapters or gone):
        raise _lost([*adapters, *lost][0], "none of whose parameters has one")
    held = params_in(g for g in groups if g.get("lora_role") in ("A", "B"))
    if adapters and _is_idle(held):
        warn(
            f"None of this optimizer's adapters has a gradient, but {adapters[0]}, which it does"
            " not hold, has one and does not train. Build the optimizer after the adapter was"
            " added and activated."
        )


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
