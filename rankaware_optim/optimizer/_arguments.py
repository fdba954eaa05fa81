"""Read and check the arguments of `RankAwareOptimizer`.

If an optimizer or a parameter group cannot be wrapped, this module raises an error
before anything has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import check_lr, is_number, plain_lr
from .._near_misses import check_names
from .._optimizers import defaults_of, get_optimizer_class, in_force, known_optimizer
from .._warn import warn
from ..errors import OptimizerError, RankAwareError
from ..inspection import Walk
from ._parts import Group, SplitGroup, shapes_of
from ._source import Settings, Source

Native = type[Optimizer]  # the optimizer class that the user passes
# `rank_aware_param_groups` adds this key to each group whose learning rate it multiplied. If the
# user passes such a group to us, the key tells us not to multiply the learning rate again.
MULTIPLIED = "rank_multiplier"


# --- parameters and groups ------------------------------------------------------------------------


def user_groups(params: Any, walked: Walk, first: int = 0) -> list[SplitGroup]:
    """Create a `SplitGroup` for each of the user's parameter groups.

    This function does not yet split the groups by learning rate. The user's arguments
    are not changed.

    Args:
        params: parameters, named parameters, or dicts of them.
        walked: the parameters of the model with their names.
        first: the number of the first group. It appears in the names of parameters that
            are not part of the model.

    Raises:
        OptimizerError: an entry is not a parameter, a group is empty, or its
            learning rate is impossible or was already multiplied.
    """
    # torch has the same rule: dicts are groups, and a list of anything else is one group.
    entries = _listed(params)
    if not isinstance(next(iter(entries), None), Mapping):
        entries = [{"params": entries}]
    names: dict[Any, str] = {p: name for name, p in walked.parameters}
    groups = []
    for number, given in enumerate(entries, first):
        snapshot = _options(given)
        listed = []
        for place, param in enumerate(snapshot["params"]):
            listed.append(names.get(param, f"group{number}.unnamed.{place}"))
        group = given if type(given) is dict else {}
        groups.append(
            SplitGroup(group, listed, shapes_of(snapshot["params"]), snapshot)
        )
    return groups


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _options(given: Any) -> Group:
    """Return a copy of a parameter group in the format that torch uses.

    If the group contains (name, parameter) pairs, the copy contains the names in a
    second list, `param_names`.
    """
    if MULTIPLIED in given:
        raise OptimizerError(
            "This parameter group was created by rank_aware_param_groups, so its learning rate"
            " has already been adjusted to its rank.",
            "Pass the model or its parameters to RankAwareOptimizer instead, or pass these groups"
            " to a plain torch optimizer.",
        )
    options = dict(given)
    if "params" not in options:
        keys = sorted(map(str, options))
        raise OptimizerError(
            f"A parameter group must contain 'params', but its only keys are {keys}.",
            "Add the parameters to the group: {'params': model.head.parameters(), ...}.",
        )
    if "lr" in options:
        check_lr(options["lr"], "A parameter group's lr")
        options["lr"] = plain_lr(options["lr"])
    entries = _listed(options["params"])
    if any(isinstance(entry, tuple) for entry in entries):
        options["param_names"] = [name for name, _ in entries]
        entries = [param for _, param in entries]
    for entry in entries:
        if not isinstance(entry, torch.Tensor):
            found = type(entry).__name__
            raise OptimizerError(
                f"A parameter group must contain only parameters, but an object of type {found}"
                " was passed.",
                "Pass tensors or (name, tensor) pairs. If you pass several groups, make every group"
                " a dict such as {'params': [...]}.",
            )
    return {**options, "params": entries}


def refuse_outside(
    groups: Iterable[SplitGroup],
    held: Collection[nn.Parameter],
    source: Source,
    *,
    built: bool = False,
    later: bool = False,
) -> None:
    """Raise an error if a parameter in the groups does not belong to any of the models.

    Without this check, the rank of an adapter in another model would be ignored.
    A parameter that belongs to no model, such as a parameter of the loss, is allowed if
    it has an explicit learning rate and the groups also contain parameters of the
    models.

    held: the models' parameters. built: whether the groups come from an existing
    optimizer, where every group has a learning rate. later: whether the groups are
    added to an optimizer that already contains the models' parameters.
    """
    outside = []
    count = 0
    for group in groups:
        for name, param in zip(group.names, group.snapshot["params"], strict=True):
            count += 1
            if param not in held:
                outside.append((group, name))
    # If no parameter belongs to the models, the user most likely passed the wrong model.
    # Explicit learning rates do not make that right, so they are not considered here.
    another_model = len(outside) == count and not later
    for group, name in outside:
        in_group = "lr" in group.snapshot and not built
        is_rated = in_group or source.explicit_rate(name, other=True) is not None
        if not is_rated or another_model:
            raise OptimizerError(
                f"The optimizer got the parameter {name}, but this parameter does not belong to a"
                " model in model=. If it belongs to an adapter, the rank of the adapter is"
                " therefore unknown.",
                "Pass all models that the optimizer trains, for example model=[unet,"
                " text_encoder]. If the parameter does not belong to a model, set its learning"
                " rate with lr in its group or with other_lr=.",
            )


# --- the optimizer --------------------------------------------------------------------------------


class NativeOptimizer(NamedTuple):
    """This class describes the optimizer that the user wants to wrap.

    native: the optimizer's class. built: the optimizer itself, if the user passed an
    existing one. settings: the arguments that apply to all parameter groups.
    """

    native: Native
    built: Optimizer | None
    settings: Settings


def read_optimizer(
    params: Any,
    optimizer: type[Optimizer] | str | None,
    lr: object,
    settings: Settings,
    ours: Collection[str],
) -> NativeOptimizer:
    """Determine which optimizer to wrap from the arguments of `RankAwareOptimizer`.

    ours: the argument names of `RankAwareOptimizer`. If a setting looks like a
    misspelling of an argument of `RankAwareOptimizer`, an error is raised. Otherwise, an
    optimizer class with `**kwargs` would silently ignore the misspelled argument.

    Raises:
        OptimizerError: the optimizer cannot use a different learning rate for each
            group.
        CallError: a setting is spelled almost like one of our arguments.
    """
    _refuse_model(params, optimizer)
    is_built = isinstance(params, Optimizer)
    native = type(params) if is_built else get_optimizer_class(optimizer)
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError(
            "This optimizer is already a RankAwareOptimizer.",
            "Remove the call to RankAwareOptimizer and use this optimizer directly.",
        )
    if reason := known_optimizer(native)[1].one_rate:
        raise OptimizerError(
            f"{native.__name__} cannot use a different learning rate for each rank, because it"
            f" {reason}.",
            "Use this optimizer without RankAwareOptimizer, or choose another optimizer.",
        )
    if is_built:
        _refuse_built(params, {"optimizer": optimizer, "lr": lr, **settings})
        return NativeOptimizer(native, params, settings_of_built(params))
    check_names("RankAwareOptimizer", settings, ours, native)
    return NativeOptimizer(native, None, settings)


def _refuse_model(first: object, optimizer: object) -> None:
    """Raise an error if the user passed a model where the optimizer class belongs."""
    if not isinstance(optimizer, nn.Module):
        return
    correct_call = "RankAwareOptimizer(params, torch.optim.AdamW, model=model, lr=...)"
    if isinstance(first, Optimizer):
        correct_call = "RankAwareOptimizer(opt, model=model)"
    model_class = type(optimizer).__name__
    raise OptimizerError(
        f"optimizer= must be an optimizer class, but a model of class {model_class} was passed.",
        f"Pass the model as the keyword argument model=, as in {correct_call}.",
    )


def settings_of_built(opt: Optimizer) -> Settings:
    """Return the settings of an existing optimizer.

    The settings are the `defaults` and the attributes of the optimizer, because some
    optimizer classes store settings as attributes.
    """
    return {**vars(opt), **opt.defaults}


def _refuse_built(built: Optimizer, given: Settings) -> None:
    """Raise an error if an existing optimizer can no longer be wrapped.

    An error is also raised if the user passed arguments that only apply to a new
    optimizer.
    """
    for argument, value in given.items():
        if value is not None:
            raise OptimizerError(
                f"{argument}= was passed together with an existing optimizer, but {argument} can"
                " only be set when an optimizer is created.",
                f"Set {argument} when you create the optimizer, or pass the optimizer's class"
                " instead of an existing optimizer.",
            )
    name = type(built).__name__
    # A scheduler replaces the instance's `step`. Ours is defined on the class, so it would never
    # be called.
    if hasattr(built.step, "_wrapped_by_lr_sched") or "step" in vars(built):
        raise OptimizerError(
            f"This {name} cannot be wrapped, because a scheduler or another library has already"
            " replaced its step method.",
            "Call RankAwareOptimizer(opt, model=model) right after you create the optimizer, and"
            " create the scheduler after this call.",
        )
    if hasattr(built, "base_lrs"):  # as in AdaBound
        raise OptimizerError(
            f"An existing {name} cannot be wrapped, because it has already stored one learning"
            " rate for each parameter group in its attribute base_lrs.",
            f"Pass the class and its settings instead: RankAwareOptimizer(model, {name}, lr=...).",
        )
    refuse_other_rates(built)


@contextmanager
def building(native: Native) -> Iterator[None]:
    """Convert an exception from the constructor of an optimizer class to an
    `OptimizerError`.
    """
    try:
        yield
    except (RankAwareError, Warning):
        raise
    except Exception as error:
        name = native.__name__
        raise OptimizerError(
            f"RankAwareOptimizer could not create the optimizer {name}, which raised {error!r}.",
            f"Pass only settings that {name} accepts. If the settings are correct, create the"
            f" optimizer yourself and wrap it: RankAwareOptimizer({name}(...), model=model). If"
            f" {name} wraps another optimizer, pass the inner optimizer to RankAwareOptimizer"
            " first.",
        ) from error


# --- its learning rates ---------------------------------------------------------------------------

# Options of groups whose names end in "lr" although they train no parameters. They belong to
# schedules, preconditioners and a thermostat.
_NO_RATES = {
    *("initial_lr", "init_lr", "base_lr", "final_lr", "min_lr", "max_lr", "swa_lr"),
    *("scheduled_lr", "precond_lr", "precondition_lr"),
    "thermostat_lr",  # FANoSV2 uses it for its friction
}


def refuse_other_rates(opt: Optimizer) -> None:
    """Raise an error if an optimizer has learning rates other than the `lr` of its
    groups.

    The multipliers of the scaling law only change the `lr` of each group, so a second
    learning rate would stay the same at every rank.
    """
    problem = ""
    for group in opt.param_groups:
        if "lr" not in group:
            problem = "has parameter groups without lr"
        for key, value in group.items():
            if key.endswith("_lr") and key not in _NO_RATES and is_number(value):
                problem = (
                    f"trains some parameters at a second learning rate, {key}={value:g}"
                )
    # Lookahead, for example, contains another optimizer, whose groups are not split by rank.
    if any(isinstance(value, Optimizer) for value in vars(opt).values()):
        problem = "contains another optimizer, whose groups would not be split by rank"
    if problem:
        name = type(opt).__name__
        raise OptimizerError(
            f"RankAwareOptimizer cannot control all learning rates of {name}, because {name}"
            f" {problem}.",
            "Use this optimizer without RankAwareOptimizer, or choose another optimizer."
            f" If {name} wraps another optimizer, pass the inner optimizer to RankAwareOptimizer"
            " first.",
        )


def refuse_own_rates(
    native: Native, groups: Iterable[SplitGroup], settings: Settings
) -> None:
    """Raise an error if a setting makes the optimizer compute its own learning rates.

    An example is `relative_step` of Adafactor, which makes the optimizer ignore the
    learning rates in its parameter groups.

    settings: the arguments that apply to all groups.
    """
    own = known_optimizer(native)[1].own_rate
    if own is None:
        return
    (setting, off), given = own, in_force(native, settings)
    for group in groups:
        value = {**given, **group.snapshot}.get(setting, off)
        if value != off:
            raise OptimizerError(
                f"With {setting}={value!r}, {native.__name__} ignores lr and computes its own"
                " learning rates.",
                f"Set {setting}={off!r}.",
            )


def with_base_lr(
    source: Source, wrapped: NativeOptimizer, groups: Iterable[SplitGroup]
) -> Source:
    """Add the base learning rate to the `Source` object, and check that the learning
    rate is valid.

    If the user passed no `lr`, the base learning rate is the default of the optimizer's
    class. The function then warns that the default was not tuned for this model, or
    raises an error if `tuned_at` was passed. If the user passed an existing optimizer,
    its groups already have learning rates, and the source is returned unchanged.
    """
    if source.lr is not None:
        check_lr(source.lr)
        return source
    if wrapped.built is not None:
        return source
    name = wrapped.native.__name__
    default = defaults_of(wrapped.native).get("lr")
    without = chain(*(g.names for g in groups if "lr" not in g.snapshot))
    # The default does not matter if every parameter gets an explicit learning rate.
    is_used = any(source.explicit_rate(each) is None for each in without)
    if not is_number(default):
        raise OptimizerError(
            f"No lr= was passed, and {name} has no default learning rate.",
            "Pass the learning rate that you tuned as lr=, and the rank and alpha at which you"
            " tuned it as tuned_at=.",
        )
    if is_used and source.reference is not None:
        raise OptimizerError(
            f"No lr= was passed, and {default:g}, the default learning rate of {name}, was not"
            " tuned for this model.",
            "Pass the learning rate that you tuned as lr=, and the rank and alpha at which you"
            " tuned it as tuned_at=.",
        )
    if is_used:
        warn(
            f"No lr= was passed, so the model trains at {default:g}, the default learning rate of"
            f" {name}, which was not tuned for this model. Pass a tuned learning rate as lr=, and"
            " pass the rank and alpha at which it was tuned as tuned_at=. Or pass a recipe as"
            " recipe=."
        )
    return replace(source, lr=default)
