"""Save checkpoints in the native layout, and check checkpoints before they are loaded.

torch does not compare the names, shapes and values in a checkpoint with the optimizer.
This module does, and raises an error if they do not fit.

The learning rates in a checkpoint are base learning rates. A group has an additional
key, `rank_parts`, only if the native layout has no room for values that a resumed run
needs. These are options that differ between the parts of a group, the base learning
rates of explicit learning rates, and the shapes of the parameters if the class does not
belong to torch.
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
    """Return whether an optimizer class is part of torch.

    The module of Muon and Adafactor is `torch.optim`, and that of other classes is a
    submodule.
    """
    return f"{native.__module__}.".startswith("torch.optim.")


# --- to save --------------------------------------------------------------------------------------


def warn_of_train_mode(opt: Optimizer) -> None:
    """Warn if a schedule-free optimizer is in train mode after it has made a step."""
    if opt.state and any(group.get("train_mode") for group in opt.param_groups):
        warn(
            f"{type(opt).__name__} is in train mode, so the model does not hold the averaged"
            " weights. Call opt.eval() before you save or evaluate the model, and opt.train()"
            " before you train on."
        )


def with_rank_parts(
    state: dict[str, Any], splits: Iterable[SplitGroup], native: type
) -> dict[str, Any]:
    """Add the values for which the native layout has no room, and return the state."""
    for group, split in zip(state["param_groups"], splits, strict=False):
        values: dict[str, Any] = _unshared(split.parts)
        # The state of another package's class does not show the shapes of the parameters.
        if not _is_torchs(native):
            # By name: torch.distributed.checkpoint may list the parameters in another order.
            values["shapes"] = dict(
                zip(split.names, map(list, split.shapes), strict=False)
            )
        if values:
            group[KEY] = values
    return state


def _unshared(parts: Sequence[Part]) -> dict[str, list[Any]]:
    """Return the options that differ between the parts of a group, with a value for
    each part.
    """
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
    """Check that a checkpoint fits this optimizer, and prepare its state for the native
    class.

    torch matches parameters by position and compares only their number, so without this
    check it would load the state of another rank. The result is the prepared state and,
    for each group, the options that differ between its parts. Nothing is loaded yet.

    Raises:
        CheckpointError: the checkpoint does not fit these parameters, or a step could not use it.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    values = [dict(group.pop(KEY, {})) for group in groups]
    state = dict(state_dict["state"])
    _check_keys(state, groups)
    # torch itself compares how many groups and parameters there are.
    for split, group, of_parts in zip(splits, groups, values, strict=False):
        _check_not_multiplied(group)
        _check_shapes(split, of_parts.pop("shapes", {}))
        _check_names(split, group)
        if _is_torchs(native):
            _fit_group(split, group, state)
    if _is_torchs(native):
        _check_values(state.values())
    return {**state_dict, "state": state, "param_groups": groups}, values


def _check_keys(state: Mapping[Any, Any], groups: Iterable[Group]) -> None:
    """Raise an error if the keys of the state are strings instead of parameter numbers.

    JSON turns numbers into strings. torch would not match such keys with parameters, so
    the run would silently continue without its moments.
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


def _check_not_multiplied(group: Group) -> None:
    """Raise an error if the learning rate of a saved group was already multiplied."""
    if MULTIPLIED in group:
        raise CheckpointError(
            "The checkpoint was saved by an optimizer of rank_aware_param_groups. Its learning"
            " rates are multiplied already.",
            "Load it into a plain optimizer of such groups.",
        )


def _check_shapes(split: SplitGroup, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise an error if the parameters of a group had different shapes when they were
    saved.
    """
    for name, here in zip(split.names, split.shapes, strict=False):
        saved = tuple(shapes.get(name, here))
        if saved != here:
            raise _of_another_shape(name, saved, here)


def _check_names(split: SplitGroup, group: Group) -> None:
    """Raise an error if the parameters of a group had different names when they were
    saved.

    The names are only compared if the checkpoint and this optimizer both contain names.
    """
    theirs = group.get("param_names")
    ours = split.group.get("param_names")
    # torch.distributed.checkpoint uses names as keys, and has brought them into our order.
    if not theirs or not ours or all(isinstance(key, str) for key in group["params"]):
        return
    for saved, here in zip(theirs, ours, strict=False):
        if canonical_name(str(saved)) != canonical_name(str(here)):
            raise CheckpointError(
                f"The checkpoint has the parameter {saved} where this optimizer has {here}.",
                "Build this optimizer with the same parameters in the same order.",
            )


def _fit_group(split: SplitGroup, group: Group, state: dict[Any, Any]) -> None:
    """Convert the state of a group's parameters to the memory layout that a step needs.

    An error is raised if an entry of the state is missing or has the wrong shape.
    """
    # A flattened group has fewer parameters than names.
    every = zip(split.names, group["params"], split.group["params"], strict=False)
    rows = [row for row in every if row[1] in state]
    kept = set().union(*(_filled_keys(state[number]) for _, number, _ in rows))
    for name, number, param in rows:
        saved = state[number]
        missing = _needed_keys(kept, param) - _filled_keys(saved)
        # A class that counts steps starts a parameter without any state from zero.
        if missing and (saved or "step" not in kept):
            raise CheckpointError(
                f"The checkpoint's state of {name} lacks {', '.join(sorted(missing))}, which other"
                " parameters of its group have.",
                "Load a complete checkpoint, or start with a new state.",
            )
        state[number] = _fitting(name, param, saved)


def _filled_keys(saved: State) -> set[str]:
    return {key for key, value in saved.items() if value is not None}


def _needed_keys(kept: set[str], param: torch.Tensor) -> set[str]:
    """Return the names of the entries that the state of a parameter must contain.

    They are the entries that the parameter's group contains, except that Adafactor
    stores different entries for matrices and for vectors.
    """
    of_matrices = {_BY_ROW, _BY_COLUMN}
    if kept.isdisjoint({*of_matrices, _OF_VECTORS}):
        return kept
    common = kept - of_matrices - {_OF_VECTORS}
    return common | (of_matrices if param.dim() > 1 else {_OF_VECTORS})


def _check_values(states: Iterable[State]) -> None:
    """Raise an error if the next step would produce NaN from the values in a
    checkpoint.

    This happens if a moment is not finite, or if a mean of squares or a step count is
    negative.
    """
    moments = []
    never_negative = []
    numbers = []
    for key, value in chain.from_iterable(each.items() for each in states):
        if isinstance(value, torch.Tensor):
            value = _local(value)
        if key in _SCALARS:
            numbers.append(float(value))
        elif isinstance(value, torch.Tensor) and value.numel():
            moments.append(value)
            if key in _NEVER_NEGATIVE:
                never_negative.append(value)
    # One call for all groups, because each call waits for the device.
    are_sound = bool(get_total_norm(moments, math.inf).isfinite())
    are_sound &= all(0.0 <= number < math.inf for number in numbers)
    are_sound &= not any(bool((moment < 0).any()) for moment in never_negative)
    if not are_sound:
        raise CheckpointError(
            "The checkpoint has moments that are not finite, or negative ones where no run makes"
            " any: its run had diverged, or the file is damaged.",
            "Load an earlier checkpoint, or start with a new state.",
        )


def _local(value: torch.Tensor) -> torch.Tensor:
    """Return a saved tensor as a plain tensor, or the local shard if the tensor is
    sharded.
    """
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def _fitting(name: str, param: torch.Tensor, saved: State) -> State:
    """Return a parameter's state with the same strides as the parameter.

    Fused kernels check neither shapes nor strides, so a mismatch would make them read
    and write out of bounds.
    """
    fitting = dict(saved)
    for key, value in saved.items():
        if key in _SCALARS or value is None:
            continue
        wanted = _shape_in_state(key, param)
        if value.shape != wanted:
            raise _of_another_shape(f"{key} of {name}", value.shape, wanted)
        if wanted != param.shape:
            # A saved tensor may share memory between its entries, which a step cannot write to.
            fitting[key] = value.contiguous()
        elif value.stride() != param.stride():
            like = torch.empty_like(param, dtype=value.dtype, device=value.device)
            fitting[key] = like.copy_(value)
    return fitting


def _shape_in_state(key: str, param: torch.Tensor) -> torch.Size:
    """Return the shape that torch's optimizers use for an entry of a parameter's state."""
    shape = list(param.shape)
    if key == _BY_ROW:
        shape[-1:] = [1]
    if key == _BY_COLUMN:
        shape[-2:-1] = [1]
    return torch.Size(shape)


def _of_another_shape(
    subject: str, saved: Iterable[int], here: Iterable[int]
) -> CheckpointError:
    return CheckpointError(
        f"{subject} has shape {tuple(saved)} in the checkpoint, but {tuple(here)} in this model.",
        "Load it into a model of the same ranks, and into an optimizer with groups that list the"
        " same parameters in the same order, frozen ones included. Or start with a new state.",
    )


# --- after the native load ------------------------------------------------------------------------


def restored(split: SplitGroup, user: Group, values: Group) -> SplitGroup:
    """Return a copy of a divided group with the options of a loaded checkpoint.

    Each part also gets back the options in which it differed from other parts. They are
    ignored if the checkpoint's group had a different number of parts. They are also
    ignored if a plain optimizer resumed from the checkpoint and changed the option,
    which we notice because the group's value no longer equals the value of the first
    part.
    """
    parts = [replace(part, group=dict(part.group)) for part in split.parts]
    made = replace(split, group=user, parts=parts, snapshot={})
    made.copy_options(user)
    made.take_snapshot()
    for key, each in values.items():
        if len(each) != len(parts) or not _still_holds(key, each[0], user):
            continue
        for part, value in zip(parts, each, strict=True):
            part.group[key] = value
    for part in parts:
        given_at = part.group.pop("given_at", None) or peak_lr(user)
        part.fix_multiplier(user["lr"], given_at)
    return made


def _still_holds(key: str, first: object, user: Group) -> bool:
    """Return whether an option of the user's group is unchanged since its parts were
    saved.

    Tensors are not compared, because a native load puts a single tensor into the group
    for all parts.
    """
    if key not in user or torch.is_tensor(first):
        return True
    return same_value(first, user[key])


def warn_of_rates(peaks: Iterable[float], groups: Iterable[Group]) -> None:
    """Warn once if the checkpoint's base learning rate differs from this optimizer's
    previous one.

    peaks: the `peak_lr` of each group before the load. groups: the groups after the
    load.
    """
    for number, (given, group) in enumerate(zip(peaks, groups, strict=True)):
        saved = peak_lr(group)
        if given and saved and abs(saved / given - 1) > 1e-6:
            warn(
                f"The checkpoint's base learning rate {saved:.3g} replaces {given:.3g} in group"
                f" {number}, as in torch, and this optimizer's multipliers apply to it. If a plain"
                " optimizer saved the checkpoint, its learning rate was not multiplied before. To"
                f" train at {given:.3g}, set group['lr'] in opt.param_groups after the load, and"
                " group['initial_lr'] before you build a scheduler."
            )
            return
