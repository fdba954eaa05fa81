"""What is given: an optimizer, and parameters or groups. What cannot be wrapped is refused before
anything is changed.
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

Native = type[Optimizer]  # the class that is wrapped
# What `rank_aware_param_groups` writes into a group beside its multiplied rate.
MULTIPLIED = "rank_multiplier"


# --- parameters and groups ------------------------------------------------------------------------


def user_groups(params: Any, walked: Walk, first: int = 0) -> list[SplitGroup]:
    """Return the user's groups, which have no parts yet. What was given is not changed.

    Args:
        params: parameters, named parameters, or dicts of them.
        walked: the model's parameters.
        first: number of the first group.

    Raises:
        OptimizerError: what is listed is no parameter, or a group holds a rate that is impossible,
            or multiplied already.
    """
    entries = _listed(params)
    if not isinstance(next(iter(entries), None), Mapping):
        entries = [{"params": entries}]
    names: dict[Any, str] = {p: name for name, p in walked.parameters}
    groups = []
    for number, given in enumerate(entries, first):
        seen = _options(given)
        listed = []
        for place, param in enumerate(seen["params"]):
            listed.append(names.get(param, f"group{number}.unnamed.{place}"))
        group = given if type(given) is dict else {}
        groups.append(SplitGroup(group, listed, shapes_of(seen["params"]), seen))
    return groups


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _options(given: Any) -> Group:
    """Return a group as torch has it: named parameters are two lists."""
    if MULTIPLIED in given:
        raise OptimizerError(
            "A parameter group is one of rank_aware_param_groups, whose rates are multiplied"
            " already.",
            "Give RankAwareOptimizer the model or its parameters, or these groups to the native"
            " class.",
        )
    options = dict(given)
    if "params" not in options:
        raise OptimizerError(
            f"A parameter group has no 'params', only {sorted(map(str, options))}.",
            "Set its parameters: {'params': model.head.parameters(), ...}.",
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
            raise OptimizerError(
                f"A parameter group holds a {type(entry).__name__}.",
                "Give tensors, (name, tensor) pairs, or dicts.",
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
    """Raise for a listed parameter that belongs to none of the models, because it may be part of an
    adapter, whose rank would then be ignored. One with an explicit learning rate is accepted beside
    the models' own parameters, for example a parameter of the loss.

    held: the models' parameters. built: whether the groups are those of a built optimizer, all of
    which have a learning rate. later: whether they are added to an optimizer, so that the models'
    own parameters are elsewhere.
    """
    outside = []
    count = 0
    for group in groups:
        for name, param in zip(group.names, group.seen["params"], strict=True):
            count += 1
            if param not in held:
                outside.append((group, name))
    another_model = len(outside) == count and not later
    for group, name in outside:
        in_group = "lr" in group.seen and not built
        is_rated = in_group or source.rate_of(name, other=True) is not None
        if not is_rated or another_model:
            raise OptimizerError(
                f"The parameter {name} belongs to none of the models in model=. If it is part of an"
                " adapter, its rank cannot be read.",
                "Pass all models, as in model=[unet, text_encoder], or set a learning rate for this"
                " parameter: lr in its group, or other_lr=.",
            )


# --- the optimizer --------------------------------------------------------------------------------


class Wrapped(NamedTuple):
    """What is wrapped: the class, the optimizer if it is built already, and the settings of all
    groups.
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
) -> Wrapped:
    """Return what is wrapped. Raise if it cannot have group rates, or if a setting is nearly one of
    `ours`, which a class with `**kwargs` would drop silently.
    """
    _refuse_model(params, optimizer)
    is_built = isinstance(params, Optimizer)
    native = type(params) if is_built else get_optimizer_class(optimizer)
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError(
            "This optimizer is rank-aware already.", "Use it as it is."
        )
    if reason := known_optimizer(native)[1].one_rate:
        raise OptimizerError(
            f"{native.__name__} {reason}, so it cannot have a rate per rank.",
            "Use it unwrapped, or choose another optimizer.",
        )
    if is_built:
        _refuse_built(params, {"optimizer": optimizer, "lr": lr, **settings})
        return Wrapped(native, params, settings_of_built(params))
    check_names("RankAwareOptimizer", settings, ours, native)
    return Wrapped(native, None, settings)


def _refuse_model(first: object, optimizer: object) -> None:
    """Raise if a model stands in the optimizer's place."""
    if not isinstance(optimizer, nn.Module):
        return
    cure = "RankAwareOptimizer(params, torch.optim.AdamW, model=model, lr=...)"
    if isinstance(first, Optimizer):
        cure = "RankAwareOptimizer(opt, model=model)"
    raise OptimizerError(
        f"optimizer is a model of class {type(optimizer).__name__}, but it must be an optimizer"
        " class.",
        f"Pass the model by its name: {cure}.",
    )


def settings_of_built(opt: Optimizer) -> Settings:
    """Return the settings of a built optimizer, some of which are attributes."""
    return {**vars(opt), **opt.defaults}


def _refuse_built(built: Optimizer, given: Settings) -> None:
    """Raise for an optimizer that cannot be regrouped any more, or beside which more is given."""
    for key, value in given.items():
        if value is not None:
            raise OptimizerError(
                f"{key}= was given for an optimizer that is built already.",
                "Give it when building it.",
            )
    name = type(built).__name__
    if hasattr(built.step, "_wrapped_by_lr_sched") or "step" in vars(built):
        raise OptimizerError(
            f"{name}'s step was replaced on the instance, as a scheduler does it, and would train"
            " without multipliers.",
            "Wrap the optimizer first, then build the scheduler.",
        )
    if hasattr(built, "base_lrs"):  # as AdaBound's
        raise OptimizerError(
            f"{name} keeps base_lrs for each of its first groups, so it cannot be regrouped.",
            "Give the class and its settings instead of the instance.",
        )
    refuse_other_rates(built)


@contextmanager
def building(native: Native) -> Iterator[None]:
    """Raise an error of ours for whatever a class raises when it gets groups of ours."""
    try:
        yield
    except (RankAwareError, Warning):
        raise
    except Exception as error:
        raise OptimizerError(
            f"{native.__name__} cannot be built with these settings on groups by rank: {error!r}.",
            "Give settings that it takes, or build it yourself and wrap the instance:"
            f" RankAwareOptimizer({native.__name__}(...), model=model). If it is one around another"
            " optimizer, wrap that one first.",
        ) from error


# --- its rates ------------------------------------------------------------------------------------

# Settings of groups that are called rates, but at which no parameter trains: those of schedules, of
# preconditioners and of a thermostat.
_NO_RATES = {
    *("initial_lr", "init_lr", "base_lr", "final_lr", "min_lr", "max_lr", "swa_lr"),
    *("scheduled_lr", "precond_lr", "precondition_lr"),
    "thermostat_lr",  # FANoSV2's, of its friction
}


def refuse_other_rates(opt: Optimizer) -> None:
    """Raise if an optimizer trains parameters at other rates than its groups' lr, which no
    multiplier would move.
    """
    whose = ""
    for group in opt.param_groups:
        if "lr" not in group:
            whose = "has no rate in its groups"
        for key, value in group.items():
            if key.endswith("_lr") and key not in _NO_RATES and is_number(value):
                whose = f"trains some parameters at a second rate, {key}={value:g}"
    if any(isinstance(value, Optimizer) for value in vars(opt).values()):
        whose = "holds another optimizer, whose groups would not change"
    if whose:
        raise OptimizerError(
            f"{type(opt).__name__} {whose}, so not all of its rates would move with the rank.",
            "Use it unwrapped, or choose another optimizer. If you gave it an optimizer, wrap that"
            " one first.",
        )


def refuse_own_rates(
    native: Native, groups: Iterable[SplitGroup], settings: Settings
) -> None:
    """Raise if the optimizer makes its rates itself in a group, so that ours would train nothing.

    settings: those given for all groups.
    """
    own = known_optimizer(native)[1].own_rate
    if own is None:
        return
    (setting, off), given = own, in_force(native, settings)
    for group in groups:
        value = {**given, **group.seen}.get(setting, off)
        if value != off:
            raise OptimizerError(
                f"{native.__name__} makes its rates itself with {setting}={value!r}, so those"
                " given would train nothing.",
                f"Give {setting}={off!r}.",
            )


def with_base_lr(
    source: Source, wrapped: Wrapped, groups: Iterable[SplitGroup]
) -> Source:
    """Return the source with a base rate: a number or a tensor that is given, else the optimizer's
    default, which was not tuned. That is refused where a reference says that it was, and warned of
    elsewhere. A built optimizer's groups have rates.
    """
    if source.lr is not None:
        check_lr(source.lr)
        return source
    if wrapped.built is not None:
        return source
    kind = wrapped.native.__name__
    default = defaults_of(wrapped.native).get("lr")
    without = chain(*(g.names for g in groups if "lr" not in g.seen))
    is_used = any(source.rate_of(name) is None for name in without)
    if not is_number(default) or (is_used and source.reference is not None):
        raise OptimizerError(
            f"No lr= was given, and {kind}'s default, {default}, is not tuned.",
            "Give the rate as lr=, with tuned_at= where it was tuned.",
        )
    if is_used:
        warn(
            f"No lr= was given, so this trains at {kind}'s default rate, {default:g}, which nobody"
            " tuned for this model. Give lr= with tuned_at=, the rank and alpha at which it was"
            " tuned, or recipe=."
        )
    return replace(source, lr=default)
