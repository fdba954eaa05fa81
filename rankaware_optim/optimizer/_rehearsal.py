"""Test a checkpoint on small stand-ins of the parameters before it is loaded, since torch checks
very little.

torch loads a moment of any shape. Its fused kernels then write past the end of it, and others raise
in `step`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import CheckpointError
from ._param_groups import TAGS, check_product

Group = dict[str, Any]
Shape = tuple[int, ...]
Matched = tuple[str, torch.Tensor, Any, Mapping[str, Any]]
_MOST = 2**24  # most numbers in a full-sized stand-in, which another package's optimizer needs
_CURE = (
    "Load a checkpoint of the same optimizer class and model, or start with a fresh optimizer"
    " state."
)


def check_loadable(
    native: type[Optimizer],
    defaults: Mapping[str, Any],
    groups: Sequence[Group],
    fitted: Mapping[str, Any],
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
    groups, fitted = _one_of_each_kind(groups, fitted)
    if not _is_torchs(native):
        _check_odd_shapes(native, defaults, groups, fitted)
        return
    loaded = fitted["param_groups"]
    try:
        made = _stepped(native, defaults, groups, _small, loaded)
    except Exception as error:
        try:
            _stepped(native, defaults, groups, _small)
        except (
            Exception
        ):  # it cannot step without a checkpoint either: SparseAdam, differentiable=True
            return
        raise CheckpointError(
            f"No step can be taken with the checkpoint's settings: {error!r}.", _CURE
        ) from error
    state = {
        key: {k: _stand_in(f"{k} of {name}", v, param, own.get(k)) for k, v in saved.items()}
        for (name, param, key, saved), own in zip(_matched(groups, fitted), made, strict=True)
    }
    try:
        _stepped(native, defaults, groups, _small, loaded, {k: v for k, v in state.items() if v})
    except Exception as error:
        raise CheckpointError(
            f"No step can be taken with the checkpoint's state: {error!r}.", _CURE
        ) from error


def _is_torchs(native: type[Optimizer]) -> bool:
    return native.step.__module__.startswith("torch.optim")


def _matched(groups: Sequence[Group], fitted: Mapping[str, Any]) -> list[Matched]:
    """Return, for every parameter: name, parameter, its key and its state in the checkpoint."""
    keys = chain.from_iterable(group["params"] for group in fitted["param_groups"])
    named = chain.from_iterable(
        zip(g["param_names"], g["params"], strict=False) for g in groups
    )  # flat: first name
    return [
        (name, p, key, fitted["state"].get(key) or {})
        for (name, p), key in zip(named, keys, strict=True)
    ]


def _one_of_each_kind(
    groups: Sequence[Group], fitted: Mapping[str, Any]
) -> tuple[list[Group], dict[str, Any]]:
    """Return the groups and the checkpoint with the first parameter of each kind, without groups
    that have none.
    """
    seen: set[Any] = set()
    own, loaded = [], []
    for number, (group, theirs) in enumerate(zip(groups, fitted["param_groups"], strict=True)):
        settings = _settings(group), _settings(theirs)
        listed = any(
            isinstance(value, list) for each in settings for _, value in each
        )  # a value for each parameter
        shared = number if listed else tuple(map(_plain, settings))
        names, params, keys = [], [], []
        for name, param, key in zip(
            group["param_names"], group["params"], theirs["params"], strict=False
        ):
            state = fitted["state"].get(key) or {}
            kind = (
                shared,
                tuple(param.shape),
                param.dtype,
                param.device,
                _plain(list(state.items())),
            )
            if listed or kind not in seen:
                seen.add(kind)
                names.append(name)
                params.append(param)
                keys.append(key)
        if params:
            own.append({**group, "params": params, "param_names": names})
            loaded.append({**theirs, "params": keys, "param_names": names})
    return own, {**fitted, "param_groups": loaded}


def _settings(group: Group) -> list[tuple[str, Any]]:
    return [
        (key, value) for key, value in group.items() if key not in (*TAGS, "params", "param_names")
    ]


def _plain(value: Any) -> Any:
    """Return a hashable value that is equal for settings or state with which a step does the same
    checks.
    """
    if isinstance(value, torch.Tensor):
        return (
            type(value),
            tuple(value.shape),
            value.dtype,
            value.device,
            value.layout,
            _number(value),
        )
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, (int, float, str, type(None))):
        return type(value), str(value)
    return id(value)


def _number(value: torch.Tensor) -> str:
    """Return a single number, such as a step counter, as text; empty for other tensors."""
    if value.numel() != 1 or value.layout != torch.strided or value.device.type == "meta":
        return ""
    local = _local(value)
    return str(local.item()) if local.numel() == 1 else ""


def _local(value: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a DTensor, or the tensor."""
    return value.to_local() if hasattr(value, "to_local") else value


def _small(shape: Shape) -> Shape:
    """Return the shape of a stand-in. Its sizes differ by axis, so that the axes of a state can be
    recognised.
    """
    return tuple(min(size, 2 + axis) for axis, size in enumerate(shape))


def _stepped(
    native: type[Optimizer],
    defaults: Mapping[str, Any],
    groups: Sequence[Group],
    shape_of: Callable[[Shape], Shape],
    loaded: Sequence[Group] | None = None,
    state: Mapping[Any, Any] | None = None,
) -> list[Mapping[str, Any]]:
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
    settings = [
        deepcopy({key: value for key, value in group.items() if key != "params"})
        for group in groups
    ]
    params = [[_ones(shape_of(tuple(p.shape)), p) for p in group["params"]] for group in groups]
    made = native.__new__(native)
    own = [{"params": each, **group} for each, group in zip(params, settings, strict=True)]
    made.__setstate__({"defaults": dict(defaults), "state": defaultdict(dict), "param_groups": own})
    if loaded is not None:
        native.load_state_dict(made, {"state": state or {}, "param_groups": loaded})
    if state is None and _is_torchs(
        native
    ):  # Adagrad of torch 2.6 makes its state when it is built
        base: Any = next(
            each for each in native.__mro__ if each.__module__.startswith("torch.optim")
        )
        made.state.update(base(own).state)
    stood = [param for each in params for param in each]
    for param in stood:
        param.grad = torch.ones_like(param)
    with torch.random.fork_rng(devices={p.device.index for p in stood if p.device.type == "cuda"}):
        for _ in range(2):  # the second step uses state of the first, such as SGD's momentum
            getattr(native.step, "__wrapped__", native.step)(made)
    if not all(bool(param.isfinite().all()) for param in stood):
        raise ArithmeticError("it gives parameters that are not finite")
    return [made.state.get(param, {}) for param in stood]


def _ones(shape: Shape, param: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=param.dtype, device=param.device))


def _stand_in(what: str, value: Any, param: torch.Tensor, made: Any) -> Any:
    """Return the stand-in of `value`, a parameter's state: zeros of the shape of `made`, the
    stand-in's own state.

    Single numbers, such as step counters, are returned unchanged. A different shape is refused.
    """
    if not isinstance(value, torch.Tensor):
        return deepcopy(value)
    if isinstance(made, torch.Tensor) and value.layout != made.layout:
        raise CheckpointError(
            f"The checkpoint's {what} is {value.layout}, where {made.layout} is needed.", _CURE
        )
    own, small, shape = tuple(param.shape), _small(tuple(param.shape)), tuple(value.shape)
    to_be = tuple(made.shape) if isinstance(made, torch.Tensor) else small if shape else ()
    expected = to_be
    if len(to_be) == len(own):
        expected = tuple(n if m == s else m for m, s, n in zip(to_be, small, own, strict=True))
    single = value.numel() == math.prod(expected) == 1
    if shape != expected and not single:
        raise _shape_error(what, shape, expected)
    if not single:
        return torch.zeros(to_be, dtype=value.dtype, device=param.device)
    return _local(value).detach().clone()


def _check_odd_shapes(
    native: type[Optimizer],
    defaults: Mapping[str, Any],
    groups: Sequence[Group],
    fitted: Mapping[str, Any],
) -> None:
    """Check another package's optimizer by a step of a full-sized stand-in for each shape in
    question.
    """
    made: dict[Any, Mapping[str, Any]] = {}
    owners = [(number, group) for number, group in enumerate(groups) for _ in group["params"]]
    for (number, group), (name, param, _, saved) in zip(
        owners, _matched(groups, fitted), strict=True
    ):
        tensors = {
            k: v for k, v in saved.items() if isinstance(v, torch.Tensor) and v.dim() == param.dim()
        }
        odd = {k: v for k, v in tensors.items() if v.shape != param.shape}
        at = number, param.shape
        if odd and at not in made and param.numel() <= _MOST:
            try:
                (made[at],) = _stepped(
                    native, defaults, [{**group, "params": [param]}], lambda shape: shape
                )
            except Exception:  # it needs a closure, another device, or state from its constructor
                made[at] = {}
        for key, value in odd.items():
            if param.shape == getattr(made.get(at, {}).get(key), "shape", None):
                raise _shape_error(f"{key} of {name}", tuple(value.shape), tuple(param.shape))


def _shape_error(what: str, shape: Shape, expected: Shape) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's {what} has shape {shape}, where {expected} is needed.", _CURE
    )
