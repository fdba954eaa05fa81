"""The arguments of `RankAwareOptimizer`: reads the optimizer and the parameters or groups. Those
that cannot be wrapped are an error, before anything is changed.
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
# `rank_aware_param_groups` adds this key to a group after multiplying its learning rate.
MULTIPLIED = "rank_multiplier"


# --- parameters and groups ------------------------------------------------------------------------


def user_groups(params: Any, walked: Walk, first: int = 0) -> list[SplitGroup]:
    """Read the user's groups. They are not divided into parts yet, and the arguments are not
    changed.

    Args:
        params: parameters, named parameters, or dicts of them.
        walked: the model, for the names of its parameters.
        first: the number of the first group, for the names of parameters outside the model.

    Raises:
        OptimizerError: an entry is not a parameter, a group lacks parameters, or its learning rate
            is impossible or was multiplied already.
    """
    # As in torch: dicts are groups, anything else is one group.
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
    """Return a group in torch's form: the names of named parameters become a second list."""
    if MULTIPLIED in given:
        raise OptimizerError(
            "A parameter group comes from rank_aware_param_groups, so its learning rate is"
            " multiplied already.",
            "Pass the model or its parameters to RankAwareOptimizer, or pass these groups to the"
            " native optimizer class.",
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
                f"A parameter group contains a {type(entry).__name__}.",
                "Pass tensors, (name, tensor) pairs, or dicts of them.",
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
    adapter, and the adapter's rank would be ignored. One with an explicit learning rate is accepted
    beside the models' own parameters, for example a parameter of the loss.

    held: the models' parameters. built: whether the groups come from an existing optimizer, where
    every group has a learning rate. later: whether they are added to an optimizer, so that the
    models' own parameters are elsewhere.
    """
    outside = []
    count = 0
    for group in groups:
        for name, param in zip(group.names, group.snapshot["params"], strict=True):
            count += 1
            if param not in held:
                outside.append((group, name))
    # If all parameters are outside, the wrong model was passed, whatever their learning rates are.
    another_model = len(outside) == count and not later
    for group, name in outside:
        in_group = "lr" in group.snapshot and not built
        is_rated = in_group or source.explicit_rate(name, other=True) is not None
        if not is_rated or another_model:
            raise OptimizerError(
                f"The parameter {name} belongs to none of the models in model=. If it is part of an"
                " adapter, its rank cannot be read.",
                "Pass all models, as in model=[unet, text_encoder], or set a learning rate for this"
                " parameter: lr in its group, or other_lr=.",
            )


# --- the optimizer --------------------------------------------------------------------------------


class NativeOptimizer(NamedTuple):
    """The optimizer to wrap.

    native: its class. built: the instance, if it exists already. settings: the arguments that apply
    to all groups.
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
    """Read which optimizer to wrap, from the arguments of `RankAwareOptimizer`.

    ours: the names of its own arguments. A setting that is nearly one of them is an error, because
    an optimizer class with `**kwargs` would ignore it silently.

    Raises:
        OptimizerError: the optimizer cannot have one learning rate for each group.
        CallError: a setting is nearly one of our arguments.
    """
    _refuse_model(params, optimizer)
    is_built = isinstance(params, Optimizer)
    native = type(params) if is_built else get_optimizer_class(optimizer)
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError(
            "This optimizer is a RankAwareOptimizer already.", "Use it as it is."
        )
    if reason := known_optimizer(native)[1].one_rate:
        raise OptimizerError(
            f"{native.__name__} {reason}, so it cannot train each rank at its own learning rate.",
            "Use it without RankAwareOptimizer, or choose another optimizer.",
        )
    if is_built:
        _refuse_built(params, {"optimizer": optimizer, "lr": lr, **settings})
        return NativeOptimizer(native, params, settings_of_built(params))
    check_names("RankAwareOptimizer", settings, ours, native)
    return NativeOptimizer(native, None, settings)


def _refuse_model(first: object, optimizer: object) -> None:
    """Raise an error if a model was passed in the optimizer's place."""
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
    """Return the settings of an existing optimizer. Some classes keep them as attributes."""
    return {**vars(opt), **opt.defaults}


def _refuse_built(built: Optimizer, given: Settings) -> None:
    """Raise an error if the groups of an existing optimizer cannot be divided any more, or if
    arguments that only apply to a new one were passed with it.
    """
    for key, value in given.items():
        if value is not None:
            raise OptimizerError(
                f"{key}= was passed with an optimizer that exists already, where it has no effect.",
                "Set it when you create that optimizer, or pass the class instead of the instance.",
            )
    name = type(built).__name__
    if hasattr(built.step, "_wrapped_by_lr_sched") or "step" in vars(built):
        raise OptimizerError(
            f"The step method of this {name} was replaced, as a scheduler does it, so it would"
            " train without multipliers.",
            "Wrap the optimizer first, then create the scheduler.",
        )
    if hasattr(built, "base_lrs"):  # as in AdaBound
        raise OptimizerError(
            f"{name} keeps a list, base_lrs, with a learning rate for each of its groups, so these"
            " cannot be divided any more.",
            "Pass the class and its settings instead of the instance.",
        )
    refuse_other_rates(built)


@contextmanager
def building(native: Native) -> Iterator[None]:
    """Turn whatever an optimizer class raises about our groups into an `OptimizerError`."""
    try:
        yield
    except (RankAwareError, Warning):
        raise
    except Exception as error:
        raise OptimizerError(
            f"{native.__name__} cannot be built with these settings on groups by rank: {error!r}.",
            "Pass settings that it accepts, or build it yourself and wrap the instance:"
            f" RankAwareOptimizer({native.__name__}(...), model=model). If it contains another"
            " optimizer, pass that one to RankAwareOptimizer first.",
        ) from error


# --- its learning rates ---------------------------------------------------------------------------

# Options of groups that are called learning rates but do not train parameters. They belong to
# schedules, preconditioners and a thermostat.
_NO_RATES = {
    *("initial_lr", "init_lr", "base_lr", "final_lr", "min_lr", "max_lr", "swa_lr"),
    *("scheduled_lr", "precond_lr", "precondition_lr"),
    "thermostat_lr",  # FANoSV2's, of its friction
}


def refuse_other_rates(opt: Optimizer) -> None:
    """Raise an error if an optimizer trains parameters at a learning rate other than the `lr` of
    its groups, because multipliers would not reach it.
    """
    whose = ""
    for group in opt.param_groups:
        if "lr" not in group:
            whose = "has no lr in its groups"
        for key, value in group.items():
            if key.endswith("_lr") and key not in _NO_RATES and is_number(value):
                whose = f"trains some parameters at a second rate, {key}={value:g}"
    # An optimizer inside, as in Lookahead, keeps its own groups and would ignore ours.
    if any(isinstance(value, Optimizer) for value in vars(opt).values()):
        whose = "contains another optimizer, whose groups would not be divided"
    if whose:
        raise OptimizerError(
            f"{type(opt).__name__} {whose}. So some of its learning rates would not follow the"
            " rank.",
            "Use it without RankAwareOptimizer, or choose another optimizer. If you created it"
            " around another optimizer, pass that one to RankAwareOptimizer first.",
        )


def refuse_own_rates(
    native: Native, groups: Iterable[SplitGroup], settings: Settings
) -> None:
    """Raise an error if a setting makes the optimizer compute its own learning rates in a group, so
    that it would ignore ours.

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
                f"With {setting}={value!r}, {native.__name__} computes its own learning rates and"
                " ignores lr.",
                f"Set {setting}={off!r}.",
            )


def with_base_lr(
    source: Source, wrapped: NativeOptimizer, groups: Iterable[SplitGroup]
) -> Source:
    """Return the source with its base learning rate, a number or a tensor.

    Without `lr` it is the default of the optimizer's class, which nobody tuned: there is a warning,
    or with `tuned_at` an error. The groups of an existing optimizer have their
    own.
    """
    if source.lr is not None:
        check_lr(source.lr)
        return source
    if wrapped.built is not None:
        return source
    kind = wrapped.native.__name__
    default = defaults_of(wrapped.native).get("lr")
    without = chain(*(g.names for g in groups if "lr" not in g.snapshot))
    # The default does not matter if every parameter has a learning rate from elsewhere.
    is_used = any(source.explicit_rate(name) is None for name in without)
    if not is_number(default) or (is_used and source.reference is not None):
        raise OptimizerError(
            f"No lr= was passed, and nobody tuned the default of {kind}, {default}.",
            "Pass lr=, and as tuned_at= the rank and alpha at which it was tuned.",
        )
    if is_used:
        warn(
            f"No lr= was passed, so the model trains at the default learning rate of {kind},"
            f" {default:g}, which nobody tuned for it. Pass lr=, and as tuned_at= the rank and"
            " alpha at which it was tuned, or pass recipe=."
        )
    return replace(source, lr=default)
