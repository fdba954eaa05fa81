"""Checkpoints: their layout is the native one, and what torch does not compare is compared.

In a group whose parts differ in what the native class wrote, or that has a rate of its own, one
more key holds the values of the parts. Rates in a checkpoint are base rates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._checks import is_number, is_positive
from .._warn import warn
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
# What torch's classes keep of a parameter once they have stepped it. Tensors among it have its
# shape, on which their kernels rely. Adafactor's state is factored.
_KEPT_BY_TORCH = {
    "Adam": "step exp_avg exp_avg_sq",
    "AdamW": "step exp_avg exp_avg_sq",
    "NAdam": "step exp_avg exp_avg_sq mu_product",
    "RAdam": "step exp_avg exp_avg_sq",
    "SparseAdam": "step exp_avg exp_avg_sq",
    "Adamax": "step exp_avg exp_inf",
    "Adagrad": "step sum",
    "Adadelta": "step square_avg acc_delta",
    "RMSprop": "step square_avg",
    "Rprop": "step prev step_size",
    "ASGD": "step eta mu ax",
    "SGD": "",
    "Muon": "momentum_buffer",
}
_SCALARS = {"step", "mu_product", "eta", "mu"}
# What they keep by a setting of their group.
_SOMETIMES = {
    "amsgrad": "max_exp_avg_sq",
    "momentum": "momentum_buffer",
    "centered": "grad_avg",
}
_MOMENTS = {*" ".join(_KEPT_BY_TORCH.values()).split(), *_SOMETIMES.values()} - _SCALARS


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
    moments, kinds = dict(state), list(filter(_is_torchs, native.__mro__))
    for split, group, of_parts in zip(splits, groups, values, strict=True):
        _check_names(split.group, group)
        params, is_own = split.group["params"], native in kinds
        kept = _kept_by(kinds[0], group) if kinds else set()
        shapes = of_parts.pop("shapes", [None] * len(params))
        rows = zip(group["params"], params, shapes, split.members, strict=False)
        for key, param, shape, member in rows:  # flattened, they are fewer
            if key in state:
                if kinds:
                    _check_torchs(member.name, param, state[key], kept, is_own)
                else:
                    _check_others(member.name, param, state[key], shape)
                moments[key] = {k: _laid_out(v, param) for k, v in state[key].items()}
    if kinds:
        _check_finite(moments.values())
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
    """Return whether a saved value is a positive number, or 0, as in a warm-up."""
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


def _is_torchs(kind: type) -> bool:
    in_torch = kind.__module__.startswith("torch.optim.")
    return in_torch and kind.__name__ in _KEPT_BY_TORCH


def _kept_by(kind: type, group: Group) -> set[str]:
    """Return what a class of torch keeps of a parameter in a group of these settings."""
    kept = set(_KEPT_BY_TORCH[kind.__name__].split())
    for setting, key in _SOMETIMES.items():
        if group.get(setting):
            kept.add(key)
    return kept


def _check_torchs(
    name: str, param: Any, saved: State, kept: Collection[str], is_own: bool
) -> None:
    """Raise where state is not what a class of torch keeps. torch would take it, and fused kernels
    then write out of bounds. is_own: whether it is not of a class that is derived from it, which
    may keep more.
    """
    missing = [key for key in kept if saved.get(key) is None]
    if missing and (saved or "step" not in kept):
        raise CheckpointError(
            f"The checkpoint's {name} lacks {', '.join(sorted(missing))}, which this optimizer"
            " keeps.",
            "Give a checkpoint of the same optimizer class and settings.",
        )
    for key, value in saved.items():
        if key in _MOMENTS and value is not None:
            is_dense = torch.is_tensor(value) and value.layout == torch.strided
            if not is_dense:
                raise CheckpointError(
                    f"The checkpoint's {name} has no dense tensor as {key}.", _CURE
                )
            if value.shape != param.shape:
                raise _of_another_shape(name, value.shape, tuple(param.shape))
        elif key in _SCALARS and not _is_rate(value):
            raise CheckpointError(
                f"The checkpoint's {name} has {key}={value!r}.", _CURE
            )
        elif is_own and torch.is_tensor(value) and value.numel() != 1:
            raise _of_another_shape(name, value.shape, tuple(param.shape))


def _check_others(name: str, param: Any, saved: State, written: Any) -> None:
    """Raise where the shapes of another class's state cannot be of a parameter. The shape that was
    written beside it decides, if there is one.
    """
    shape = tuple(param.shape)
    if written is not None and tuple(written) != shape:
        raise _of_another_shape(name, written, shape)
    if written is None and not _fits(saved, shape):
        raise _of_another_shape(name, _shapes_in(saved, len(shape))[0], shape)


def _check_finite(states: Iterable[Any]) -> None:
    """Raise for moments that are not finite: a step would give NaN, or none."""
    moments = [
        value
        for state in states
        for key, value in state.items()
        if key in _MOMENTS and _is_float(value)
    ]
    if not moments:
        return
    largest = torch._foreach_norm(moments, float("inf"))  # one call for all
    together = torch.stack([norm.to("cpu", torch.float64) for norm in largest])
    if not together.isfinite().all():
        raise CheckpointError(
            "The checkpoint has moments that are not finite: its run had diverged.",
            "Go back to an earlier one, or start with a new state.",
        )


def _is_float(value: Any) -> bool:
    is_plain = type(value) is torch.Tensor and value.layout == torch.strided
    return is_plain and value.is_floating_point() and value.numel() > 0


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


# --- the rates ------------------------------------------------------------------------------------


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


def peak_of(group: Group) -> float:
    """Return the rate from which a group's schedule starts. OneCycleLR starts at a fraction."""
    peak: Any = group.get("max_lr") or group.get("initial_lr", group["lr"])
    return float(peak)


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
        peak = peak_of(user)
        for part, own in zip(split.parts, _by_part(split, of_parts), strict=True):
            part.settle(peak if part.assigned.lr else user["lr"])
            pinned, saved = part.assigned.lr, own.pop("own_lr", None)
            multiplier = own.pop("multiplier", None)
            # its base may have been scheduled since, so the ratio is kept
            if pinned and saved and multiplier:
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
