"""Checkpoints: their layout is the native one, and what torch does not compare is compared.

In a group whose parts differ in what the native class wrote, or that has a rate of its own, one
more key holds the values of the parts. Rates in a checkpoint are base rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._checks import is_number, is_positive
from ..errors import CheckpointError
from ..inspection import canonical_name
from ._parts import SplitGroup, same
from ._user_groups import MULTIPLIED, Group

Shape = tuple[int, ...]
State = Mapping[Any, Any]

KEY = "rank_parts"
_CURE = "Give the result of optimizer.state_dict()."
_OTHER_MODEL = (
    "Load it into a model of the same ranks and shapes, or start with a new state."
)
# State of torch's classes, on whose shapes their kernels rely. Adafactor's is factored.
_MOMENTS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "step_size", "ax"),
}


# --- to save --------------------------------------------------------------------------------------


def with_parts(state: dict[str, Any], splits: Iterable[SplitGroup]) -> dict[str, Any]:
    """Return a native state with what its layout does not hold."""
    for group, split in zip(state["param_groups"], splits, strict=False):
        values = _of_parts(split)
        moments = map(state["state"].get, group["params"])
        if not all(map(_fits, moments, [shape for _, shape in split.members])):
            values["shapes"] = [list(shape) for _, shape in split.members]
        if values:
            group[KEY] = values
    return state


def _of_parts(split: SplitGroup) -> dict[str, list[Any]]:
    """Return what the parts of a group do not share, a value a part."""
    parts, values = split.parts, {}
    for key in parts[0].group.keys() - {"params", "lr"} - set(split.lists):
        each = [part.group.get(key) for part in parts]
        if not _all_same(each):
            values[key] = each
    if any(part.assigned.lr is not None for part in parts):
        values["own_lr"] = [part.assigned.lr for part in parts]
        values["multiplier"] = [part.multiplier for part in parts]
    bases = [split.base_of(part) for part in parts]
    if not _all_same(bases):
        values["lr"] = bases
    return values


def _all_same(values: Sequence[Any]) -> bool:
    return all(same(value, values[0]) for value in values)


# --- to load --------------------------------------------------------------------------------------


def read_checkpoint(
    splits: Sequence[SplitGroup], state_dict: Any, native: type
) -> tuple[dict[str, Any], list[Group]]:
    """Return a native state to load, and the values of the parts by group. Nothing is changed.

    Raises:
        CheckpointError: it is no checkpoint, or not of these parameters.
    """
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not groups or not isinstance(state, Mapping):
        raise CheckpointError(
            "This is not an optimizer checkpoint: it lacks param_groups or state.",
            _CURE,
        )
    groups = [dict(group) for group in groups]
    values = [dict(group.pop(KEY, {})) for group in groups]
    for group, of_parts in zip(groups, values, strict=True):
        _check_rates(group, of_parts)
    _check_sizes(splits, groups, state)
    moments = dict(state)
    for split, group, of_parts in zip(splits, groups, values, strict=True):
        _check_names(split.group, group)
        params = split.group["params"]
        shapes = of_parts.pop("shapes", [None] * len(params))
        rows = zip(group["params"], params, shapes, split.members, strict=False)
        for key, param, shape, member in rows:  # flattened, they are fewer
            if key in state:
                _check_moments(member.name, param, state[key], shape, native)
                moments[key] = {k: _laid_out(v, param) for k, v in state[key].items()}
    return {**state_dict, "state": moments, "param_groups": groups}, values


def _check_sizes(
    splits: Sequence[SplitGroup], groups: Sequence[Group], state: State
) -> None:
    """Raise if the checkpoint has other groups, or its parameters by other keys than its state."""
    ours = [len(split.group["params"]) for split in splits]
    theirs = [len(group["params"]) for group in groups]
    if ours != theirs:
        raise CheckpointError(
            f"The checkpoint has groups of {theirs} parameters, this optimizer groups of {ours}.",
            "Give this optimizer the groups of the saved one, in the same order, frozen parameters"
            " included. Or load it into the model that it was saved from.",
        )
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise CheckpointError("The checkpoint's groups list a parameter twice.", _CURE)
    if {str(key) for key in keys if isinstance(key, int)} & state.keys():
        raise CheckpointError(
            "The checkpoint's state has its parameters' numbers as text, as JSON writes them, so no"
            " parameter would find its moments.",
            "Save it with torch.save, or turn the keys of its state into ints.",
        )


def _check_rates(group: Group, values: Group) -> None:
    """Raise for a rate that would be misread, or that is multiplied already."""
    if MULTIPLIED in group:
        raise CheckpointError(
            "The checkpoint is of rank_aware_param_groups, whose rates are multiplied already.",
            "Load it into a native optimizer of such groups.",
        )
    rates = {key: [group.get(key, group.get("lr"))] for key in ("lr", "initial_lr")}
    for key in ("lr", "multiplier", "own_lr"):
        rates[f"{KEY}.{key}"] = [v for v in values.get(key, ()) if v is not None]
    for key, each in rates.items():
        for value in each:
            if not _is_rate(value):
                raise CheckpointError(
                    f"A group of the checkpoint has {key}={value!r}.", _CURE
                )


def _is_rate(value: Any) -> bool:
    """Return whether a saved value is a positive number, or the 0 of a warm-up."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return is_positive(value) or (is_number(value) and value == 0)


def _check_names(user: Group, group: Group) -> None:
    """Raise if both sides have the parameters' names and these differ: torch goes by the order."""
    theirs, ours = group.get("param_names"), user.get("param_names")
    # torch.distributed.checkpoint has names as keys, in the optimizer's order
    if not theirs or not ours or all(isinstance(key, str) for key in group["params"]):
        return
    for saved, here in zip(theirs, ours, strict=False):
        if canonical_name(str(saved)) != canonical_name(str(here)):
            raise CheckpointError(
                f"The checkpoint has the parameter {saved} where this optimizer has {here}.",
                "Give this optimizer the parameters of the saved one, in the same order.",
            )


def _check_moments(
    name: str, param: Any, saved: State, written: Any, native: type
) -> None:
    """Raise for state that cannot belong to a parameter. torch would take it, and fused kernels
    then write out of bounds.

    Torch's own moments have the parameter's shape. Of another class's state the written shape
    decides, if there is one.
    """
    shape = tuple(param.shape)
    if any(map(_is_torchs, native.__mro__)):
        for key, value in saved.items():
            checked = key in _MOMENTS or _is_torchs(native)
            scalar = torch.is_tensor(value) and value.numel() == 1
            if scalar and key not in _MOMENTS:
                continue
            if checked and torch.is_tensor(value) and value.shape != param.shape:
                raise _of_another_shape(name, value.shape, shape)
    elif written is not None and tuple(written) != shape:
        raise _of_another_shape(name, written, shape)
    elif written is None and not _fits(saved, shape):
        raise _of_another_shape(name, _shapes_in(saved, len(shape))[0], shape)


def _is_torchs(kind: type) -> bool:
    """Return whether a class is one of torch's that keep moments of their parameters' shapes."""
    others = ("Optimizer", "Adafactor")
    return kind.__module__.startswith("torch.optim.") and kind.__name__ not in others


def _of_another_shape(name: str, saved: Iterable[int], shape: Shape) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's {name} has shape {tuple(saved)}, the parameter {shape}.",
        _OTHER_MODEL,
    )


def _fits(saved: State | None, shape: Shape) -> bool:
    """Return whether state shows by its shapes that it is of a parameter of this shape.

    It does if there is none of as many axes, if one has its shape, or if they are factored
    statistics: these have size 1 along reduced axes, and together cover every axis.
    """
    shapes = _shapes_in(saved, len(shape))
    if not shapes or shape in shapes:
        return True
    by_axis = [set(sizes) for sizes in zip(*shapes, strict=True)]
    return all(
        size in sizes <= {1, size} for size, sizes in zip(shape, by_axis, strict=True)
    )


def _shapes_in(saved: State | None, axes: int) -> list[Shape]:
    """Return the shapes of state tensors with as many axes as the parameter, such as moments."""
    tensors = filter(torch.is_tensor, (saved or {}).values())
    return [tuple(value.shape) for value in tensors if value.dim() == axes > 0]


def _laid_out(value: Any, param: torch.Tensor) -> Any:
    """Return `value` with the parameter's memory layout, which fused kernels assume."""
    plain = (torch.Tensor, nn.Parameter)
    if type(value) not in plain or value.layout != torch.strided:
        return value
    like = param if type(param) in plain and param.shape == value.shape else value
    if value.is_contiguous() and like.is_contiguous():  # the usual case
        return value
    if value.stride() == torch.empty_like(like, device="meta").stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


# --- after the native load ------------------------------------------------------------------------


def restore(
    splits: Iterable[SplitGroup], users: Sequence[Group], values: Sequence[Group]
) -> None:
    """Bring the parts to a loaded state: the options of their groups, and what differs between
    them.
    """
    for split, user, of_parts in zip(splits, users, values, strict=True):
        split.group, split.lr = user, user["lr"]
        split.follow_options(always=True)
        split.see()
        # OneCycleLR starts at a fraction of the rate
        peak = user.get("max_lr") or user.get("initial_lr", user["lr"])
        for part, own in zip(split.parts, _by_part(split, of_parts), strict=True):
            part.settle(peak)
            pinned, saved = part.assigned.lr, own.pop("own_lr", None)
            multiplier = own.pop("multiplier", None)
            if (
                pinned and saved and multiplier
            ):  # its base may have been scheduled since
                part.multiplier = multiplier * (pinned / saved)
            part.base = own.pop("lr", user["lr"])
            part.group.update(own)


def _by_part(split: SplitGroup, values: Group) -> Iterator[Group]:
    """Yield the values of each part. Those of another split are left out, and those whose first is
    not the group's: a plain optimizer went on from there.
    """
    count, user, kept = len(split.parts), split.group, {}
    for key, each in values.items():
        if key == "params" or len(each) != count:
            continue
        is_state = torch.is_tensor(each[0])
        if is_state or key not in user or same(each[0], user[key]):
            kept[key] = each
    for i in range(count):
        yield {key: each[i] for key, each in kept.items()}
