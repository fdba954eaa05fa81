"""Checkpoints: their layout is the native one, and what torch does not compare is compared.

In a group whose parts differ in what the native class wrote, that has a rate of its own, or whose
class is not torch's, one more key holds the values of the parts, or the parameters' shapes. Rates
in a checkpoint are base rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from torch.optim import Adafactor, Optimizer

from .._warn import warn
from ..errors import CheckpointError
from ..inspection import canonical_name
from ._arguments import MULTIPLIED
from ._parts import Group, Part, SplitGroup, State, peak_of, same

KEY = "rank_parts"
# What torch's classes keep of a parameter that is one number. The rest has the parameter's shape.
_SCALARS = {"step", "mu_product", "eta", "mu"}


def _is_torchs(native: type) -> bool:
    """Return whether a class is torch's. Adafactor's state has shapes of its own."""
    return native.__module__.startswith("torch.optim.") and native is not Adafactor


# --- to save --------------------------------------------------------------------------------------


def warn_of_train_mode(opt: Optimizer) -> None:
    """Warn of a schedule-free optimizer that is in train mode, after a step."""
    if opt.state and any(group.get("train_mode") for group in opt.param_groups):
        warn(
            f"{type(opt).__name__} is in train mode, in which the model's weights are not"
            " those that it averages. Call opt.eval() before you save or evaluate the model, and"
            " opt.train() before you go on."
        )


def with_parts(
    state: dict[str, Any], splits: Iterable[SplitGroup], native: type
) -> dict[str, Any]:
    """Return a native state with what its layout does not hold."""
    for group, split in zip(state["param_groups"], splits, strict=False):
        values = _unshared(split.parts)
        if not _is_torchs(native):
            values["shapes"] = list(map(list, split.shapes))
        if values:
            group[KEY] = values
    return state


def _unshared(parts: Sequence[Part]) -> dict[str, list[Any]]:
    """Return what the parts of a group do not share, a value a part."""
    values = {}
    for key in parts[0].group.keys() - {"params", "lr"}:
        each = [part.group.get(key) for part in parts]
        if not all(same(value, each[0]) for value in each):
            values[key] = each
    if any(part.given_at for part in parts):
        values["given_at"] = [part.given_at for part in parts]
    return values


# --- to load --------------------------------------------------------------------------------------


def read_checkpoint(
    splits: Sequence[SplitGroup], state_dict: Any, native: type
) -> tuple[dict[str, Any], list[Group]]:
    """Return a native state to load, and the values of the parts by group. Nothing is changed.

    torch matches parameters by their places, and compares nothing else.

    Raises:
        CheckpointError: it is not of these parameters.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    values = [dict(group.pop(KEY, {})) for group in groups]
    state = dict(state_dict["state"])
    # torch counts groups and parameters
    for split, group, of_parts in zip(splits, groups, values, strict=False):
        _check_group(split, group, of_parts.pop("shapes", split.shapes))
        if _is_torchs(native):
            _fit_group(split, group, state)
    if _is_torchs(native):
        _check_finite(state.values())
    return {**state_dict, "state": state, "param_groups": groups}, values


def _check_group(split: SplitGroup, group: Group, shapes: Sequence[Any]) -> None:
    """Raise if a group's rate is multiplied already, or if its parameters have other shapes or
    names. Names are compared where both sides have them.
    """
    if MULTIPLIED in group:
        raise CheckpointError(
            "The checkpoint is of rank_aware_param_groups, whose rates are multiplied already.",
            "Load it into a native optimizer of such groups.",
        )
    for name, saved, here in zip(split.names, shapes, split.shapes, strict=False):
        if tuple(saved) != here:
            raise _of_another_shape(name, saved, here)
    theirs = group.get("param_names")
    ours = split.group.get("param_names")
    # torch.distributed.checkpoint has names as keys, in the optimizer's order
    if not theirs or not ours or all(isinstance(key, str) for key in group["params"]):
        return
    for saved, here in zip(theirs, ours, strict=False):
        if canonical_name(str(saved)) != canonical_name(str(here)):
            raise CheckpointError(
                f"The checkpoint has the parameter {saved} where this optimizer has {here}.",
                "Give this optimizer the parameters of the saved one, in the same order.",
            )


def _fit_group(split: SplitGroup, group: Group, state: dict[Any, Any]) -> None:
    """Let a group's state fit its parameters, or raise where a step could not take it."""
    # flattened, parameters are fewer than names
    every = zip(split.names, group["params"], split.group["params"], strict=False)
    rows = [row for row in every if row[1] in state]
    kept = set().union(*(_kept(state[number]) for _, number, _ in rows))
    for name, number, param in rows:
        saved = state[number]
        missing = kept - _kept(saved)
        # classes that count steps start again where there is nothing
        if missing and (saved or "step" not in kept):
            raise CheckpointError(
                f"The checkpoint's {name} lacks {', '.join(sorted(missing))}, which the others of"
                " its group have.",
                "Give a checkpoint that is whole, or start with a new state.",
            )
        state[number] = _fitting(name, param, saved)


def _kept(saved: State) -> set[Any]:
    return {key for key, value in saved.items() if value is not None}


def _check_finite(states: Iterable[State]) -> None:
    """Raise for moments that are not finite, and for impossible steps: training would give NaN."""
    moments = []
    is_sound = True
    for key, value in chain.from_iterable(each.items() for each in states):
        if key in _SCALARS:
            is_sound &= 0.0 <= float(value) < math.inf
        elif type(value) is torch.Tensor and value.numel():
            moments.append(value)
    largest = get_total_norm(moments, math.inf)  # one call for all groups
    if not (is_sound and largest.isfinite()):
        raise CheckpointError(
            "The checkpoint has moments that are not finite: its run had diverged.",
            "Go back to an earlier one, or start with a new state.",
        )


def _fitting(name: str, param: torch.Tensor, saved: State) -> State:
    """Return what a class of torch keeps of a parameter, laid out in memory as it is. Fused kernels
    look at neither shapes nor strides, and would read and write out of bounds.
    """
    made = dict(saved)
    for key, value in saved.items():
        if key in _SCALARS or value is None:
            continue
        if value.shape != param.shape:
            raise _of_another_shape(name, value.shape, param.shape)
        if value.stride() != param.stride():
            like = torch.empty_like(param, dtype=value.dtype, device=value.device)
            made[key] = like.copy_(value)
    return made


def _of_another_shape(
    name: str, saved: Iterable[int], here: Iterable[int]
) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's {name} has shape {tuple(saved)}, the parameter {tuple(here)}.",
        "Load it into a model of the same ranks, and an optimizer whose groups have the same"
        " parameters in the same order, frozen ones included; or start with a new state.",
    )


# --- after the native load ------------------------------------------------------------------------


def restored(split: SplitGroup, user: Group, values: Group) -> SplitGroup:
    """Return a split group at a loaded state: with the options of its group, and with what differs
    between its parts. What is of another split is left out, and where a plain optimizer went on,
    whose group has another value than the first part.
    """
    parts = [replace(part, group=dict(part.group)) for part in split.parts]
    made = replace(split, group=user, parts=parts, seen={})
    made.follow_options(user)
    made.see()
    for key, each in values.items():
        is_new = key not in user or torch.is_tensor(each[0])
        if len(each) == len(parts) and (is_new or same(each[0], user[key])):
            for part, value in zip(parts, each, strict=True):
                part.group[key] = value
    for part in parts:
        given_at = part.group.pop("given_at", None) or peak_of(user)
        part.settle(user["lr"], given_at)
    return made


def warn_of_rates(built: Iterable[float], groups: Iterable[Group]) -> None:
    """Warn once where a loaded base rate is not that with which this optimizer was built.

    built, groups: `peak_of` each group before the load, and the groups after it.
    """
    for number, (given, group) in enumerate(zip(built, groups, strict=True)):
        saved = peak_of(group)
        if given and saved and abs(saved / given - 1) > 1e-6:
            warn(
                f"The checkpoint's base rate trains on in group {number}, as natively: {saved:.3g},"
                f" times this optimizer's multipliers, and not the {given:.3g} with which it was"
                " built. If a plain optimizer wrote the checkpoint, its rate was not multiplied"
                " before. For the other rate, set group['lr'] of opt.param_groups after the load,"
                " and group['initial_lr'] before a scheduler is built."
            )
            return
