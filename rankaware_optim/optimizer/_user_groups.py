"""The user's parameters and groups, by the names that the parameters have in the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .._checks import check_lr, plain_lr
from ..errors import OptimizerError
from ..inspection import Walk, as_one_model, refuse_frozen, walk

Group = dict[str, Any]
# What `rank_aware_param_groups` writes into a group beside its multiplied rate.
MULTIPLIED = "rank_multiplier"


def model_of(params: Any, model: Any) -> nn.Module:
    """Return the model that holds the adapters: `model`, by default `params`."""
    holder = params if model is None else as_one_model(model)
    is_trainer = hasattr(holder, "args") or hasattr(holder, "train")
    if hasattr(holder, "model") and is_trainer and not isinstance(holder, nn.Module):
        raise OptimizerError(
            f"A {type(holder).__name__} is a trainer, not a model.",
            "Call rankaware_optim.attach(trainer, AdamW, ...) with the same settings.",
        )
    if isinstance(holder, (str, type)):
        raise OptimizerError(
            "The model and the optimizer's class are swapped.",
            "Give the model first: RankAwareOptimizer(model, AdamW, ...).",
        )
    if not isinstance(holder, nn.Module):
        raise OptimizerError(
            "LoRA factors cannot be found from parameters alone.",
            "Give the model as the first argument, or as model= with parameters or an optimizer.",
        )
    return holder


class UserGroup(NamedTuple):
    """One of the user's groups: its named parameters, its options without `params`, and the dict
    that was given.
    """

    named: list[tuple[str, torch.Tensor]]
    options: Group
    given: Group

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named)


def user_groups(
    params: Any,
    model: nn.Module,
    walked: Walk,
    first: int = 0,
    *,
    outside: bool = False,
) -> list[UserGroup]:
    """Return the user's parameters as named groups. What was given is not changed.

    Args:
        params: a model (its trainable parameters), parameters, named parameters, or dicts of them.
        model: the model that holds the adapters.
        walked: the model's parameters.
        first: number of the first group.
        outside: whether it is allowed that no parameter belongs to the model.

    Raises:
        InspectionError: there is no parameter, and the model's LoRA factors are frozen.
        OptimizerError: a parameter is listed twice, there is none, none belongs to the model, or a
            group holds a rate that is multiplied already.
    """
    names: dict[Any, str] = {p: name for name, p in walked.parameters}
    taken = set(names.values())
    groups: list[UserGroup] = []
    seen: set[torch.Tensor] = set()
    for number, given in enumerate(_dicts(params, model, walked), first):
        group = _read(given, names, taken, number)
        for name, param in group.named:
            if param in seen:
                raise OptimizerError(
                    f"The parameter {name} is listed twice.",
                    "List every parameter in one group only.",
                )
            seen.add(param)
        groups.append(group)
    if not seen:
        refuse_frozen(walked)
        raise OptimizerError(
            "There is no trainable parameter to optimize.",
            "Set requires_grad on what should be trained.",
        )
    if seen.isdisjoint(names) and not outside:
        raise OptimizerError(
            f"None of the {len(seen)} parameters given belongs to the model.",
            "Give the model that these parameters belong to as model=.",
        )
    return groups


def _dicts(params: Any, model: nn.Module, walked: Walk) -> list[Any]:
    """Return the user's parameters as torch's list of dicts."""
    if isinstance(params, nn.Module):
        parameters = (walked if params is model else walk(params)).parameters
        params = [p for _, p in parameters if p.requires_grad]
    entries = _listed(params)
    is_of_dicts = bool(entries) and isinstance(entries[0], Mapping)
    return entries if is_of_dicts else [{"params": entries}]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _read(
    given: Any, names: Mapping[Any, str], taken: Collection[str], number: int
) -> UserGroup:
    """Return one of the user's groups. Its options are torch's: named parameters are two lists."""
    if MULTIPLIED in given:
        raise OptimizerError(
            "A parameter group is one of rank_aware_param_groups, whose rates are multiplied"
            " already.",
            "Give RankAwareOptimizer the model or its parameters, or these groups to the native"
            " class.",
        )
    options = dict(given)
    if "lr" in options:
        check_lr(options["lr"], "A parameter group's lr")
        options["lr"] = plain_lr(options["lr"])
    entries = _listed(options.pop("params"))
    labels = options.get("param_names") or [None] * len(entries)
    if any(isinstance(entry, tuple) for entry in entries):
        labels = options["param_names"] = [name for name, _ in entries]
        entries = [param for _, param in entries]
    named = list(_named(entries, labels, names, taken, number))
    return UserGroup(named, options, given if isinstance(given, dict) else {})


def _named(
    params: Iterable[Any],
    labels: Iterable[str | None],
    names: Mapping[Any, str],
    taken: Collection[str],
    number: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a group's parameters, each by its name in the model, or one of its own."""
    for place, (param, label) in enumerate(zip(params, labels, strict=True)):
        if not isinstance(param, torch.Tensor):
            raise OptimizerError(
                f"A parameter group holds a {type(param).__name__}.",
                "Give tensors, (name, tensor) pairs, or dicts.",
            )
        unnamed = label is None or label in taken
        outside = f"group{number}.{label or 'unnamed'}.{place}" if unnamed else label
        yield names.get(param, outside or ""), param
