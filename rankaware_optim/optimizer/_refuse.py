"""What is wrapped, and what is refused before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from .._checks import check_lr, is_number
from .._optimizers import defaults_of, get_optimizer_class, known_optimizer
from .._warn import warn
from ..errors import OptimizerError, RankAwareError
from ._assign import Explicit
from ._source import Tuned
from ._user_groups import UserGroup

Native = type[Optimizer]  # the class that is wrapped
Settings = Mapping[str, Any]


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
    """Return what is wrapped. Raise if it cannot have group rates, or if an argument is not one of
    `ours` nor of the class.
    """
    if not isinstance(params, Optimizer):
        if optimizer is None:
            raise OptimizerError(
                "No optimizer was given.",
                "Give a class, such as RankAwareOptimizer(model, AdamW, ...).",
            )
        native: Native = get_optimizer_class(optimizer)
        refuse_one_rate(native)
        _refuse_class(native)
        _refuse_keywords(native, settings, ours)
        return Wrapped(native, None, settings)
    if optimizer is not None:
        raise OptimizerError(
            "Both a built optimizer and a class were given.", "Give one of the two."
        )
    given = next(iter(settings), None if lr is None else "lr")
    if given is not None:
        raise OptimizerError(
            f"{given}= was given for an optimizer that is built already.",
            "Give it when building it.",
        )
    native = type(params)
    refuse_one_rate(native)
    _refuse_built(params)
    return Wrapped(native, params, settings_of_built(params))


def _refuse_class(native: Native) -> None:
    """Raise for a class that cannot be built on groups of ours."""
    name, takes = native.__name__, inspect.signature(native).parameters
    _refuse_wrapper(native)
    if next(iter(takes), "") == "model":
        raise OptimizerError(
            f"{name} takes a model and makes its groups itself.",
            f"Build it, then wrap it: RankAwareOptimizer({name}(model, ...), model=model).",
        )
    if "lr" not in takes and not _takes_any(native):
        raise OptimizerError(
            f"{name} takes no lr=.",
            f"Build it yourself and wrap the instance: {_of_instance(native)}.",
        )


def _takes_any(native: Native) -> bool:
    """Return whether a class takes `**kwargs`."""
    takes = inspect.signature(native).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)


def _of_instance(native: Native) -> str:
    """Return how an instance is wrapped, of a class that looks at its parameters when built."""
    return f"RankAwareOptimizer({native.__name__}(...), model=model)"


@contextmanager
def building(native: Native) -> Iterator[None]:
    """Raise an error of ours for whatever a class raises when it is built on groups of ours."""
    try:
        yield
    except (RankAwareError, Warning):
        raise
    except Exception as error:
        raise OptimizerError(
            f"{native.__name__} cannot be built with these settings on groups by rank: {error!r}.",
            "Give settings that it takes, or build it yourself and wrap the instance:"
            f" {_of_instance(native)}.",
        ) from error


def _refuse_wrapper(native: Native) -> None:
    """Raise for the class of an optimizer around another one."""
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError(
            "This optimizer is rank-aware already.", "Use it as it is."
        )
    takes = inspect.signature(native).parameters
    if {"optimizer", "base_optimizer", "optimizer_class"}.intersection(takes):
        raise OptimizerError(
            f"{native.__name__} wraps another optimizer, whose groups would not change.",
            "Wrap the inner one first: RankAwareOptimizer(model, AdamW, ...). Then wrap the"
            " result.",
        )


def _refuse_built(built: Optimizer) -> None:
    """Raise for an optimizer that cannot be regrouped any more."""
    name, attributes = type(built).__name__, vars(built)
    _refuse_wrapper(type(built))
    if hasattr(built.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "A scheduler was built on this optimizer and holds its step.",
            "Wrap the optimizer first, then build the scheduler.",
        )
    if "step" in attributes:
        raise OptimizerError(
            f"{name} has a step of its own on the instance, which would train without"
            " multipliers.",
            "Wrap the optimizer before anything replaces its step.",
        )
    own = {"param_groups", *inspect.signature(type(built)).parameters}  # such as betas
    for kept, value in attributes.items():
        # as AdaBound keeps its groups' rates
        of_groups = isinstance(value, (list, tuple)) and kept not in own
        of_groups = of_groups and len(value) == len(built.param_groups)
        if of_groups and all(map(is_number, value)):
            raise OptimizerError(
                f"{name} keeps {kept} for each of its first groups, so it cannot be regrouped.",
                "Give the class and its settings instead of the instance.",
            )
    refuse_other_rates(built)


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
    theirs, takes_any = inspect.signature(native).parameters, _takes_any(native)
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


# What ends as a rate in groups, and is none at which a parameter trains: a schedule's, or that of a
# preconditioner.
_NO_RATES = {
    *("initial_lr", "init_lr", "base_lr", "final_lr", "min_lr", "max_lr", "swa_lr"),
    *("scheduled_lr", "precond_lr", "precondition_lr"),
}


def refuse_other_rates(opt: Optimizer) -> None:
    """Raise if an optimizer has no rate in its groups, or trains parameters at another one too,
    which no multiplier would move.
    """
    name = type(opt).__name__
    if any("lr" not in group for group in opt.param_groups):
        raise OptimizerError(
            f"{name} has no rate in its groups, so none can be set by rank.",
            "Use it unwrapped, or choose another optimizer.",
        )
    if any(isinstance(value, Optimizer) for value in vars(opt).values()):
        raise OptimizerError(
            f"{name} holds another optimizer, whose groups would not change.",
            "If you gave it that one, wrap that one first. Else use it unwrapped, or choose another"
            " optimizer.",
        )
    for key, value in chain(*(group.items() for group in opt.param_groups)):
        if key.endswith("_lr") and key not in _NO_RATES and is_number(value):
            raise OptimizerError(
                f"{name} trains some of its parameters at a second rate, {key}={value:g}, which"
                " would not move with their rank.",
                "Use it unwrapped, or choose another optimizer.",
            )


def settings_of_built(opt: Optimizer) -> Settings:
    """Return the settings of a built optimizer, some of which are attributes."""
    return {**vars(opt), **opt.defaults}


def check_base_lr(
    wrapped: Wrapped, source: Tuned, groups: Iterable[UserGroup], explicit: Explicit
) -> None:
    """Check the given base rate, a number or a tensor, or else that the optimizer or its groups
    have rates.

    The optimizer's default was not tuned. It is refused where a reference says that it was, and
    warned of elsewhere.
    """
    name = wrapped.native.__name__
    if source.lr is not None:
        check_lr(source.lr)
    if wrapped.built is not None or source.lr is not None:
        return
    default = defaults_of(wrapped.native).get("lr")
    if not isinstance(default, (int, float)):
        raise OptimizerError(f"{name} has no default learning rate.", "Give lr=.")
    without = [group.names for group in groups if "lr" not in group.options]
    if all(explicit.rate_of(each) is not None for each in chain(*without)):
        return
    if source.reference is not None:
        raise OptimizerError(
            f"tuned_at= was given without lr=, but {name}'s default, {default}, is not tuned.",
            "Give the tuned rate as lr=, or leave tuned_at= out.",
        )
    warn(
        f"No lr= was given, so this trains at {name}'s default rate, {default:g}, which nobody"
        " tuned for this model. Give lr= with tuned_at=, the rank and alpha at which it was tuned,"
        " or recipe=."
    )


def refuse_outside(
    groups: Iterable[UserGroup],
    held: Collection[nn.Parameter],
    explicit: Explicit,
    *,
    built: bool = False,
) -> None:
    """Raise for a listed parameter that no model given holds, unless a rate is given for it.

    It may be an adapter's, whose rank would move nothing. held: the models' parameters. built:
    whether the groups are those of a built optimizer, all of which have a rate.
    """
    for group in groups:
        if explicit.other_lr is not None or ("lr" in group.options and not built):
            continue
        for name, param in group.named:
            if param not in held and explicit.rate_of(name) is None:
                raise OptimizerError(
                    f"The parameter {name} of shape {tuple(param.shape)} belongs to no model given,"
                    " so its rank is unknown and its rate would not move.",
                    "Give all models, as model=[unet, text_encoder], or a rate for it: lr in its"
                    " group, or other_lr=.",
                )


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
    of_torch = native.__module__.startswith("torch.optim")
    if odd and native.__name__ == "Muon" and of_torch:
        raise OptimizerError(
            f"Muon takes only matrices, but {len(odd)} parameters are not, such as {odd[0]}.",
            "Give Muon groups of the 2-D parameters with model=, and the rest to another"
            " optimizer.",
        )
