"""The user's parameters and groups, by the names that the parameters have in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .._checks import check_lr, plain_lr
from ..errors import OptimizerError
from ..inspection import Walk, refuse_frozen, walk

Group = dict[str, Any]
# What `rank_aware_param_groups` writes into a group beside its multiplied rate.
MULTIPLIED = "rank_multiplier"


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
    groups = []
    for number, given in enumerate(_dicts(params, model, walked), first):
        labelled, options = _read(given)
        named = []
        for place, (label, param) in enumerate(labelled):
            if label is None or label in taken:  # by the model's parameters
                label = f"group{number}.unnamed.{place}"
            named.append((names.get(param, label), param))
        groups.append(UserGroup(named, options, given if type(given) is dict else {}))
    if not any(group.named for group in groups):
        refuse_frozen(walked)
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


def _read(given: Any) -> tuple[list[tuple[str | None, torch.Tensor]], Group]:
    """Return a group's parameters with the names that were given, and its options as torch has
    them: named parameters are two lists.
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
    if any(isinstance(entry, tuple) for entry in entries):
        options["param_names"] = [name for name, _ in entries]
        entries = [param for _, param in entries]
    for entry in entries:
        if not isinstance(entry, torch.Tensor):
            raise OptimizerError(
                f"A parameter group holds a {type(entry).__name__}.",
                "Give tensors, (name, tensor) pairs, or dicts.",
            )
    labels = options.get("param_names") or [None] * len(entries)
    return list(zip(labels, entries, strict=True)), options
