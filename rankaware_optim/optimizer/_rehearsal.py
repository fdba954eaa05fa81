"""Test a checkpoint on small stand-ins of the parameters before it is loaded, since torch checks
very little.

torch loads a moment of any shape. Its fused kernels then write past the end of it, and others raise
in `step`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ._param_groups import (
    Group,
    Groups,
    Native,
    Shape,
    State,
    check_product,
    named_params,
    params_in,
    settings_in,
    without,
)

_MOST = (
    2**24
)  # most numbers in a full-sized stand-in, which another package's optimizer needs
_CURE = (
    "Load a checkpoint of the same optimizer class and model, or start with a fresh optimizer"
    " state."
)


# a parameter's group, its name, itself, its key and its state in the checkpoint
_Matched = tuple[Group, str, torch.Tensor, Any, State]


def check_loadable(
    native: Native, defaults: State, groups: Groups, fitted: State
) -> None:
    """Check that an optimizer of class `native` can hold a checkpoint and step with it.

    For torch's optimizers, stand-ins take steps with the checkpoint's settings, then with its
    state. Parameters whose settings, shapes, dtypes and state are alike have one stand-in, so the
    cost follows the kinds of parameters. The state of another package's optimizer may have any
    shape. A tensor is refused if its shape differs from its parameter's although the optimizer
    makes it with the parameter's shape.

    Args:
        native: the optimizer class.
        defaults: the optimizer's defaults.
        groups: the optimizer's groups.
        fitted: the checkpoint, with the same groups.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    for group in fitted["param_groups"]:
        check_product(group, CheckpointError)
    groups, loaded = _one_of_each_kind(groups, fitted)
    matched = list(_matched(groups, loaded, fitted["state"]))
    if not _is_torchs(native):
        _check_odd_shapes(native, defaults, matched)
        return
    try:
        states = _stepped(native, defaults, groups, _small, loaded)
    except Exception as error:
        if not _can_step(native, defaults, groups):
            return
        raise _no_step("settings", error) from error
    state: dict[Any, Any] = defaultdict(dict)
    for (_, name, param, key, moments), ours in zip(matched, states, strict=True):
        for k, v in moments.items():
            state[key][k] = _stand_in(f"{k} of {name}", v, param, ours.get(k))
    try:
        _stepped(native, defaults, groups, _small, loaded, state)
    except Exception as error:
        raise _no_step("state", error) from error


def _no_step(part: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"No step can be taken with the checkpoint's {part}: {error!r}.", _CURE
    )


def _can_step(native: Native, defaults: State, groups: Groups) -> bool:
    """Return whether it can step without a checkpoint: not SparseAdam, nor differentiable=True."""
    try:
        _stepped(native, defaults, groups, _small)
    except Exception:
        return False
    return True


def _is_torchs(native: Native) -> bool:
    return native.step.__module__.startswith("torch.optim")


def _matched(groups: Groups, loaded: Groups, state: State) -> Iterator[_Matched]:
    """Yield our parameters with what the checkpoint has of them."""
    for group, theirs in zip(groups, loaded, strict=True):
        named = named_params([group])
        for (name, param), key in zip(named, theirs["params"], strict=True):
            yield group, name, param, key, state.get(key) or {}


def _one_of_each_kind(groups: Groups, fitted: State) -> tuple[Groups, Groups]:
    """Return the groups and the checkpoint's with the first parameter of each kind, without groups
    that have none.
    """
    kinds: set[Any] = set()
    ours, loaded = [], []
    for number, (group, theirs) in enumerate(
        zip(groups, fitted["param_groups"], strict=True)
    ):
        settings = [*settings_in(group).items(), *settings_in(theirs).items()]
        # a value for each parameter
        listed = any(isinstance(value, list) for _, value in settings)
        shared = number if listed else _plain(settings)
        firsts = []
        for position, (_, _, param, _, moments) in enumerate(
            _matched([group], [theirs], fitted["state"])
        ):
            of_param = (tuple(param.shape), param.dtype, param.device)
            kind = (shared, of_param, _plain(list(moments.items())))
            if listed or kind not in kinds:
                kinds.add(kind)
                firsts.append(position)
        if firsts:
            ours.append(_cut(group, firsts))
            loaded.append(_cut(theirs, firsts))
    return ours, loaded


def _cut(group: Group, positions: Sequence[int]) -> Group:
    """Return a group with some of its parameters."""
    cut = dict(group)
    for key in ("params", "param_names"):
        cut[key] = [group[key][position] for position in positions]
    return cut


def _plain(value: Any) -> Any:
    """Return a hashable value that is equal for settings or state with which a step does the same
    checks.
    """
    if isinstance(value, torch.Tensor):
        number, like = "", (value.dtype, value.device, value.layout)
        if value.layout == torch.strided and value.device.type != "meta":
            local = _local(value)
            if value.numel() == local.numel() == 1:  # such as a step counter
                number = str(local.item())
        return type(value), tuple(value.shape), like, number
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, (int, float, str, type(None))):
        return type(value), str(value)
    return id(value)


def _local(value: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a DTensor, or the tensor."""
    return value.to_local() if hasattr(value, "to_local") else value


def _small(shape: Shape) -> Shape:
    """Return the shape of a stand-in. Its sizes differ by axis, so that the axes of a state can be
    recognised.
    """
    return tuple(min(size, 2 + axis) for axis, size in enumerate(shape))


def _stepped(
    native: Native,
    defaults: State,
    groups: Groups,
    shape_of: Callable[[Shape], Shape],
    loaded: Groups | None = None,
    state: State | None = None,
) -> list[State]:
    """Take two steps with stand-ins for the parameters of `groups`, in a new optimizer, and return
    its state.

    No hooks run. Errors of the load or the step are passed on.

    Args:
        native: the optimizer class.
        defaults: the optimizer's defaults.
        groups: its groups.
        shape_of: the shape of a parameter's stand-in.
        loaded: a checkpoint's groups, which are loaded.
        state: a checkpoint's state, which is loaded with them; None for that of an optimizer newly
            built.

    Raises:
        ArithmeticError: the step does not give finite numbers.
    """
    stand_ins = [_with_stand_ins(group, shape_of) for group in groups]
    fresh = {"state": defaultdict(dict), "param_groups": stand_ins}
    opt: Any = native.__new__(native)
    opt.__setstate__({"defaults": dict(defaults), **fresh})
    if loaded is not None:
        native.load_state_dict(opt, {"state": state or {}, "param_groups": loaded})
    if state is None:
        opt.state.update(_state_when_built(native, stand_ins))
    params = params_in(stand_ins)
    step = getattr(native.step, "__wrapped__", native.step)
    with torch.random.fork_rng(devices={p.device.index for p in params if p.is_cuda}):
        step(opt)
        step(opt)  # it uses state of the first, such as SGD's momentum
    if not all(bool(param.isfinite().all()) for param in params):
        raise ArithmeticError("it gives parameters that are not finite")
    return [opt.state.get(param, {}) for param in params]


def _state_when_built(native: Native, groups: Groups) -> State:
    """Return the state that torch's constructor makes: Adagrad's of torch 2.6."""
    for base in native.__mro__ if _is_torchs(native) else ():
        if base.__module__.startswith("torch.optim"):
            built: Any = base
            return built(groups).state  # type: ignore[no-any-return]
    return {}


def _with_stand_ins(group: Group, shape_of: Callable[[Shape], Shape]) -> Group:
    """Return a copy of a group whose parameters and gradients are ones."""
    params = []
    for param in group["params"]:
        shape = shape_of(tuple(param.shape))
        ones = torch.ones(shape, dtype=param.dtype, device=param.device)
        params.append(nn.Parameter(ones))
        params[-1].grad = ones.clone()
    return {"params": params, **deepcopy(without(group, ("params",)))}


def _stand_in(what: str, value: Any, param: torch.Tensor, ours: Any) -> Any:
    """Return the stand-in of `value`, a parameter's state: zeros of the shape of `ours`, the
    stand-in's own state.

    Single numbers, such as step counters, are returned unchanged. A different shape is refused.
    """
    if not isinstance(value, torch.Tensor):
        return deepcopy(value)
    full, shape = tuple(param.shape), tuple(value.shape)
    small = _small(full)
    reduced = small if shape else ()
    if isinstance(ours, torch.Tensor):
        reduced = tuple(ours.shape)
        if value.layout != ours.layout:
            raise CheckpointError(
                f"The checkpoint's {what} is {value.layout}, where {ours.layout} is needed.",
                _CURE,
            )
    expected = reduced
    if len(reduced) == len(full):
        axes = zip(reduced, small, full, strict=True)
        expected = tuple(
            of_full if size == of_small else size for size, of_small, of_full in axes
        )
    if value.numel() == math.prod(expected) == 1:
        return _local(value).detach().clone()
    if shape != expected:
        raise _shape_error(what, shape, expected)
    return torch.zeros(reduced, dtype=value.dtype, device=param.device)


def _check_odd_shapes(
    native: Native,
    defaults: State,
    matched: Iterable[_Matched],
) -> None:
    """Check another package's optimizer by a step of a full-sized stand-in for each shape in
    question.
    """
    for group, name, param, _, moments in matched:
        odd = {}
        for key, value in moments.items():
            same_axes = isinstance(value, torch.Tensor) and value.dim() == param.dim()
            if same_axes and value.shape != param.shape:
                odd[key] = tuple(value.shape)
        ours = _own_state(native, defaults, group, param) if odd else {}
        for key, shape in odd.items():
            if getattr(ours.get(key), "shape", None) == param.shape:
                raise _shape_error(f"{key} of {name}", shape, tuple(param.shape))


def _own_state(
    native: Native, defaults: State, group: Group, param: torch.Tensor
) -> State:
    """Return the state of a full-sized stand-in after two steps; empty if it is too large or cannot
    step.
    """
    if param.numel() > _MOST:
        return {}
    alone = [{**group, "params": [param]}]
    try:
        return _stepped(native, defaults, alone, lambda shape: shape)[0]
    except (
        Exception
    ):  # it needs a closure, another device, or state from its constructor
        return {}


def _shape_error(what: str, shape: Shape, expected: Shape) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's {what} has shape {shape}, where {expected} is needed.", _CURE
    )
