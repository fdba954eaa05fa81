"""Checkpoints: they have the native layout, and loading one checks what torch does not check.

Learning rates in a checkpoint are base rates. A group has one more key, `rank_parts`, only if the
native layout cannot hold what a resumed run needs: values in which the parts of the group differ,
base rates of explicit rates, or, for a class that is not torch's own, the parameters' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from .._warn import warn
from ..errors import CheckpointError
from ..inspection import canonical_name
from ._arguments import MULTIPLIED
from ._parts import Group, Part, SplitGroup, State, peak_lr, same_value

KEY = "rank_parts"
# The state of torch's own classes. These entries are one number. Adafactor keeps the mean squares
# of a matrix by row and by column. All others have the parameter's shape.
_SCALARS = {"step", "mu_product", "eta", "mu"}
_BY_ROW, _BY_COLUMN, _OF_VECTORS = "row_var", "col_var", "variance"
# Means or maxima of squares and of absolute values. A step takes the root of most of them.
_NEVER_NEGATIVE = {
    *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"),
    *(_BY_ROW, _BY_COLUMN, _OF_VECTORS),
}


def _is_torchs(native: type) -> bool:
    """Return whether a class is torch's own. Muon and Adafactor name `torch.optim` itself as their
    module, the others a module in it.
    """
    return f"{native.__module__}.".startswith("torch.optim.")


# --- to save --------------------------------------------------------------------------------------


def warn_of_train_mode(opt: Optimizer) -> None:
    """Warn of a schedule-free optimizer that is in train mode, after a step."""
    if opt.state and any(group.get("train_mode") for group in opt.param_groups):
        warn(
            f"{type(opt).__name__} is in train mode, in which the model's weights are not"
            " those that it averages. Call opt.eval() before you save or evaluate the model, and"
            " opt.train() before you go on."
        )


def with_rank_parts(
    state: dict[str, Any], splits: Iterable[SplitGroup], native: type
) -> dict[str, Any]:
    """Return a native state with what its layout does not hold."""
    for group, split in zip(state["param_groups"], splits, strict=False):
        values: dict[str, Any] = _unshared(split.parts)
        if not _is_torchs(native):
            # By name: torch.distributed.checkpoint may list the parameters in another order.
            values["shapes"] = dict(
                zip(split.names, map(list, split.shapes), strict=False)
            )
        if values:
            group[KEY] = values
    return state


def _unshared(parts: Sequence[Part]) -> dict[str, list[Any]]:
    """Return what the parts of a group do not share, a value a part."""
    values = {}
    for key in parts[0].group.keys() - {"params", "lr"}:
        each = [part.group.get(key) for part in parts]
        if not all(same_value(value, each[0]) for value in each):
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
    _check_keys(state, groups)
    # torch itself compares the numbers of groups and of parameters
    for split, group, of_parts in zip(splits, groups, values, strict=False):
        _check_group(split, group, of_parts.pop("shapes", {}))
        if _is_torchs(native):
            _fit_group(split, group, state)
    if _is_torchs(native):
        _check_values(state.values())
    return {**state_dict, "state": state, "param_groups": groups}, values


def _check_keys(state: Mapping[Any, Any], groups: Iterable[Group]) -> None:
    """Raise if the numbers of the parameters became strings in the state, as in JSON. torch would
    keep such entries beside the parameters, which would start without moments.
    """
    numbers = {key for group in groups for key in group["params"]}
    for key in state:
        if isinstance(key, str) and key.isdecimal() and key not in numbers:
            raise CheckpointError(
                f"The checkpoint's state has the string {key!r} as a key where a parameter's"
                " number should be, as after a round trip through JSON. Its moments would be"
                " ignored.",
                "Save checkpoints with torch.save, or turn the keys of state_dict['state'] back"
                " into int.",
            )


def _check_group(
    split: SplitGroup, group: Group, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raise if a group's rate is multiplied already, or if its parameters have other shapes or
    names. Names are compared where both sides have them.
    """
    if MULTIPLIED in group:
        raise CheckpointError(
            "The checkpoint was saved by an optimizer of rank_aware_param_groups, whose learning"
            " rates are multiplied already.",
            "Load it into a plain optimizer of such groups.",
        )
    for name, here in zip(split.names, split.shapes, strict=False):
        saved = tuple(shapes.get(name, here))
        if saved != here:
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
                "Build this optimizer with the same parameters in the same order.",
            )


def _fit_group(split: SplitGroup, group: Group, state: dict[Any, Any]) -> None:
    """Let a group's state fit its parameters, or raise where a step could not take it."""
    # flattened, parameters are fewer than names
    every = zip(split.names, group["params"], split.group["params"], strict=False)
    rows = [row for row in every if row[1] in state]
    kept = set().union(*(_kept(state[number]) for _, number, _ in rows))
    for name, number, param in rows:
        saved = state[number]
        impossible = {_OF_VECTORS} if param.dim() > 1 else {_BY_ROW, _BY_COLUMN}
        missing = kept - _kept(saved) - impossible
        # classes that count steps start again where there is nothing
        if missing and (saved or "step" not in kept):
            raise CheckpointError(
                f"The checkpoint's state of {name} lacks {', '.join(sorted(missing))}, which other"
                " parameters of its group have.",
                "Load a complete checkpoint, or start with a new state.",
            )
        state[number] = _fitting(name, param, saved)


def _kept(saved: State) -> set[Any]:
    return {key for key, value in saved.items() if value is not None}


def _check_values(states: Iterable[State]) -> None:
    """Raise if the moments are not finite, or if numbers are negative that no run makes negative.
    Training on from either would give NaN.
    """
    moments = []
    is_sound = True
    for key, value in chain.from_iterable(each.items() for each in states):
        if isinstance(value, torch.Tensor):
            value = _local(value)
        if key in _SCALARS:
            is_sound &= 0.0 <= float(value) < math.inf
        elif isinstance(value, torch.Tensor) and value.numel():
            moments.append(value)
            is_sound &= key not in _NEVER_NEGATIVE or not bool((value < 0).any())
    largest = get_total_norm(moments, math.inf)  # one call for all groups
    if not (is_sound and largest.isfinite()):
        raise CheckpointError(
            "The checkpoint has moments that are not finite, or negative ones where no run makes"
            " any: its run had diverged, or the file is damaged.",
            "Load an earlier checkpoint, or start with a new state.",
        )


def _local(value: torch.Tensor) -> torch.Tensor:
    """Return a saved tensor as a plain one: of a sharded tensor the part of this process."""
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def _fitting(name: str, param: torch.Tensor, saved: State) -> State:
    """Return the state that a class of torch keeps of a parameter, laid out in memory as it is.
    Fused kernels check neither shapes nor strides, and would read and write out of bounds.
    """
    fitting = dict(saved)
    for key, value in saved.items():
        if key in _SCALARS or value is None:
            continue
        wanted = _shape_in_state(key, param)
        if value.shape != wanted:
            raise _of_another_shape(f"{key} of {name}", value.shape, wanted)
        if wanted != param.shape:
            fitting[key] = value.contiguous()
        elif value.stride() != param.stride():
            like = torch.empty_like(param, dtype=value.dtype, device=value.device)
            fitting[key] = like.copy_(value)
    return fitting


def _shape_in_state(key: str, param: torch.Tensor) -> torch.Size:
    """Return the shape that an entry of a parameter's state has."""
    shape = list(param.shape)
    if key == _BY_ROW:
        shape[-1:] = [1]
    if key == _BY_COLUMN:
        shape[-2:-1] = [1]
    return torch.Size(shape)


def _of_another_shape(
    what: str, saved: Iterable[int], here: Iterable[int]
) -> CheckpointError:
    return CheckpointError(
        f"{what} has shape {tuple(saved)} in the checkpoint, but {tuple(here)} in this model.",
        "Load it into a model of the same ranks, and into an optimizer whose groups list the same"
        " parameters in the same order, frozen ones included. Or start with a new state.",
    )


# --- after the native load ------------------------------------------------------------------------


def restored(split: SplitGroup, user: Group, values: Group) -> SplitGroup:
    """Return a split group at a loaded state: with the options of its group, and with what differs
    between its parts. What is of another split is left out, and where a plain optimizer went on,
    whose group has another value than the first part.
    """
    parts = [replace(part, group=dict(part.group)) for part in split.parts]
    made = replace(split, group=user, parts=parts, snapshot={})
    made.copy_options(user)
    made.take_snapshot()
    for key, each in values.items():
        is_new = key not in user or torch.is_tensor(each[0])
        if len(each) == len(parts) and (is_new or same_value(each[0], user[key])):
            for part, value in zip(parts, each, strict=True):
                part.group[key] = value
    for part in parts:
        given_at = part.group.pop("given_at", None) or peak_lr(user)
        part.fix_multiplier(user["lr"], given_at)
    return made


def warn_of_rates(built: Iterable[float], groups: Iterable[Group]) -> None:
    """Warn once where a loaded base rate is not that with which this optimizer was built.

    built, groups: `peak_lr` each group before the load, and the groups after it.
    """
    for number, (given, group) in enumerate(zip(built, groups, strict=True)):
        saved = peak_lr(group)
        if given and saved and abs(saved / given - 1) > 1e-6:
            warn(
                f"The checkpoint's base rate trains on in group {number}, as natively: {saved:.3g},"
                f" times this optimizer's multipliers, and not the {given:.3g} with which it was"
                " built. If a plain optimizer wrote the checkpoint, its rate was not multiplied"
                " before. For the other rate, set group['lr'] of opt.param_groups after the load,"
                " and group['initial_lr'] before a scheduler is built."
            )
            return
