"""The user's parameters and groups, by the names that the parameters have in the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    if not isinstance(holder, nn.Module):
        raise OptimizerError(
            f"LoRA factors are found in a model, and this is a {type(holder).__name__}.",
            "Give the model first, or as model= beside parameters or an optimizer. For a trainer"
            " call rankaware_optim.attach(trainer, AdamW, ...).",
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
    params: Any, model: nn.Module, walked: Walk, first: int = 0
) -> list[UserGroup]:
    """Return the user's parameters as named groups. What was given is not changed.

    Args:
        params: a model (its trainable parameters), parameters, named parameters, or dicts of them.
        model: the model that holds the adapters.
        walked: the model's parameters.
        first: number of the first group.

    Raises:
        InspectionError: there is no parameter, and the model's LoRA factors are frozen.
        OptimizerError: what is listed is no parameter, or a group holds a rate that is impossible,
            or multiplied already.
    """
    names: dict[Any, str] = {p: name for name, p in walked.parameters}
    taken = set(names.values())
    if isinstance(params, nn.Module):
        parameters = (walked if params is model else walk(params)).parameters
        params = [p for _, p in parameters if p.requires_grad]
    entries = _listed(params)
    if not entries or not isinstance(entries[0], Mapping):
        entries = [{"params": entries}]
    groups = [
        _read(given, names, taken, number)
        for number, given in enumerate(entries, first)
    ]
    if not any(group.named for group in groups):
        refuse_frozen(walked)
    return groups


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _read(
    given: Any, names: Mapping[Any, str], taken: Collection[str], number: int
) -> UserGroup:
    """Return one of the user's groups. Its options are torch's: named parameters are two lists.

    names: of the model's parameters, `taken` as a set. number: that of the group.
    """
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
    named = []
    for place, (param, label) in enumerate(zip(entries, labels, strict=True)):
        if not isinstance(param, torch.Tensor):
            raise OptimizerError(
                f"A parameter group holds a {type(param).__name__}.",
                "Give tensors, (name, tensor) pairs, or dicts.",
            )
        own = f"group{number}.{label or 'unnamed'}.{place}"
        is_free = label is not None and label not in taken
        named.append((names.get(param, label if is_free else own), param))
    return UserGroup(named, options, given if isinstance(given, dict) else {})
