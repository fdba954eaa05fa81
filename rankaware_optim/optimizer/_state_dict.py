"""This module saves checkpoints in the format of the native optimizer, and checks
checkpoints before they are loaded.

When torch loads a checkpoint, it does not check the names, shapes and values in it.
This module checks the names, shapes and values, and raises an error if the checkpoint
does not fit the optimizer.

The learning rates in a checkpoint are base learning rates. The native format cannot
store some of the values that a resumed run needs. These are options that differ between
the parts of a group, the base learning rates of explicit learning rates, and the shapes
of the parameters if the class does not belong to torch. These values are saved
under an additional key of each group, `rank_parts`.
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

    Muon and Adafactor belong to the module `torch.optim`, and all other classes belong
    to one of its submodules.
    """
    return f"{native.__module__}.".startswith("torch.optim.")


# --- to save --------------------------------------------------------------------------------------


def warn_of_train_mode(opt: Optimizer) -> None:
    """Warn if a schedule-free optimizer is in train mode and has already made a step."""
    if opt.state and any(group.get("train_mode") for group in opt.param_groups):
        name = type(opt).__name__
        warn(
            f"The optimizer {name} is in train mode, so the model does not contain the averaged"
            " weights. Call opt.eval() before you save or evaluate the model, and opt.train()"
            " before you continue training."
        )


def with_rank_parts(
    state: dict[str, Any], splits: Iterable[SplitGroup], native: type
) -> dict[str, Any]:
    """Add the values that the native format cannot store to the state, and return the
    state.
    """
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
    """Return the options that differ between the parts of a parameter group, with one
    value for each part.
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
    """Check that a checkpoint fits this optimizer, and prepare its state for loading.

    torch only compares the number of parameters, and assigns the saved states by
    position. Without this check, torch could load the state of one parameter into a
    parameter of another rank. The function returns the prepared state and, for each
    group, the options that differ between its parts. Nothing is loaded yet.

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
    """Raise an error if a key of the state is a string instead of a parameter number.

    If a checkpoint was converted to JSON, its keys are strings. With string keys, torch
    would not find the parameters, and the run would silently continue without its
    moments.
    """
    numbers = {key for group in groups for key in group["params"]}
    for key in state:
        if isinstance(key, str) and key.isdecimal() and key not in numbers:
            raise CheckpointError(
                "The keys of state_dict['state'] must be integers, but one key is the string"
                f" {key!r}. The checkpoint was probably converted to JSON, where all keys are"
                " strings.",
                "Save checkpoints with torch.save, or convert the keys of state_dict['state']"
                " back to int.",
            )


def _check_not_multiplied(group: Group) -> None:
    """Raise an error if the learning rates in a checkpoint have already been
    multiplied.
    """
    if MULTIPLIED in group:
        raise CheckpointError(
            "The checkpoint was saved by a plain optimizer with groups from"
            " rank_aware_param_groups. Its learning rates have already been multiplied for each"
            " rank, and RankAwareOptimizer would multiply them again.",
            "Load the checkpoint into a plain optimizer with groups from rank_aware_param_groups.",
        )


def _check_shapes(split: SplitGroup, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise an error if the saved parameters have different shapes than the current
    ones.
    """
    for name, here in zip(split.names, split.shapes, strict=False):
        saved = tuple(shapes.get(name, here))
        if saved != here:
            raise _of_another_shape(name, saved, here)


def _check_names(split: SplitGroup, group: Group) -> None:
    """Raise an error if the saved parameters have different names than the current
    ones.

    Names are only compared if both the checkpoint and this optimizer contain the names of
    their parameters.
    """
    theirs = group.get("param_names")
    ours = split.group.get("param_names")
    # torch.distributed.checkpoint uses names as keys, and has brought them into our order.
    if not theirs or not ours or all(isinstance(key, str) for key in group["params"]):
        return
    for saved_name, name in zip(theirs, ours, strict=False):
        if canonical_name(str(saved_name)) != canonical_name(str(name)):
            raise CheckpointError(
                "The checkpoint contains other parameters than this optimizer, or the same"
                f" parameters in another order. It contains {saved_name} in the position of"
                f" {name}.",
                "Create the optimizer with the same parameters in the same order as when the"
                " checkpoint was saved.",
            )


def _fit_group(split: SplitGroup, group: Group, state: dict[Any, Any]) -> None:
    """Convert the saved states of a group's parameters to the same memory layout as the
    parameters.

    The function raises an error if the state of a parameter is incomplete, or if a
    tensor in it has the wrong shape.
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
            lacking = ", ".join(sorted(missing))
            raise CheckpointError(
                f"In the checkpoint, the optimizer state of the parameter {name} does not contain"
                f" {lacking}, but the states of other parameters in the same group do.",
                "Load a complete checkpoint, or start without loading the optimizer state.",
            )
        state[number] = _fitting(name, param, saved)


def _filled_keys(saved: State) -> set[str]:
    return {key for key, value in saved.items() if value is not None}


def _needed_keys(kept: set[str], param: torch.Tensor) -> set[str]:
    """Return the names of the entries that a parameter's state must contain.

    All parameters of a group need the same entries, except in Adafactor, which stores
    different entries for matrices and for vectors.
    """
    of_matrices = {_BY_ROW, _BY_COLUMN}
    if kept.isdisjoint({*of_matrices, _OF_VECTORS}):
        return kept
    common = kept - of_matrices - {_OF_VECTORS}
    return common | (of_matrices if param.dim() > 1 else {_OF_VECTORS})


def _check_values(states: Iterable[State]) -> None:
    """Raise an error if the values in a checkpoint would make the next step produce
    NaN.

    The next step produces NaN if a moment is not finite, or if a mean of squares or a
    step count is negative.
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
            "The optimizer state in the checkpoint contains NaN, infinite values, or negative"
            " values where only positive ones are possible. Its run probably diverged, or the file"
            " is damaged.",
            "Load an earlier checkpoint, or start without loading the optimizer state.",
        )


def _local(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a checkpoint, or only the shard of this process if the tensor
    is sharded.
    """
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def _fitting(name: str, param: torch.Tensor, saved: State) -> State:
    """Convert the tensors in a parameter's state to the same strides as the parameter.

    Fused kernels do not check shapes and strides. If a state did not fit its parameter,
    a fused kernel would read and write outside the tensors.
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
    """Return the shape that torch uses for an entry of a parameter's optimizer state."""
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
        "Use a model with the same ranks, and create the optimizer with the same parameters in"
        " the same order, including frozen parameters. Or start without loading the optimizer"
        " state.",
    )


# --- after the native load ------------------------------------------------------------------------


def restored(split: SplitGroup, user: Group, values: Group) -> SplitGroup:
    """Return a copy of a split group with the options from a loaded checkpoint.

    The function also restores options that had different values in the parts. Such an
    option is ignored if the saved group had a different number of parts. It is also
    ignored if its value in the group is no longer equal to the value in the first part,
    because a plain optimizer then loaded the checkpoint and changed the option.
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
    """Return whether the value of an option in the group still equals the value in the
    first part.

    Tensors are not compared, because loading a checkpoint creates a single tensor that
    all parts of the group share.
    """
    if key not in user or torch.is_tensor(first):
        return True
    return same_value(first, user[key])


def warn_of_rates(peaks: Iterable[float], groups: Iterable[Group]) -> None:
    """Warn if loading a checkpoint changed the base learning rate of a group.

    peaks: the `peak_lr` of each group before the load. groups: the groups after the
    load.
    """
    for number, (given, group) in enumerate(zip(peaks, groups, strict=True)):
        saved = peak_lr(group)
        if given and saved and abs(saved / given - 1) > 1e-6:
            warn(
                f"Loading the checkpoint changed the base learning rate of group {number} from"
                f" {given:.3g} to {saved:.3g}, as in torch. The new value is multiplied for each"
                " rank, even if a plain optimizer saved the checkpoint. To train at"
                f" {given:.3g}, set group['lr'] in opt.param_groups after you load the checkpoint,"
                " and set group['initial_lr'] before you create a scheduler."
            )
            return
