"""A model as it was found: taken down before trials change it, and put back to the bit.

Frozen weights are not copied. What is copied is what a trial may write: parameters that train, buffers, and tensors
that modules hold as plain attributes. All else (attributes, containers, hooks, modes, gradients, which object is
which parameter) is kept by reference, so putting it back moves no memory and may be done twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import CalibrationError
from ...inspection import Walk

# Integer tensors above this size are a quantised weight: as frozen as any, and as large.
_QUANTISED = 2**16


class _Held(NamedTuple):
    """A container by identity, and what it held."""

    name: str
    container: Any
    content: Any

    def put_back(self) -> None:
        live, content = self.container, self.content
        if isinstance(live, list):
            live[:] = content
            return
        is_dict = not isinstance(live, set)
        if is_dict and list(live) == list(content) and all(live[key] is value for key, value in content.items()):
            return
        live.clear()
        live.update(content)


class _Param(NamedTuple):
    """A parameter's switches: what it points at, whether it trains, its gradient and its hooks."""

    name: str
    param: torch.Tensor
    data: torch.Tensor
    requires_grad: bool
    grad: torch.Tensor | None
    hooks: tuple[_Held, ...]

    def put_back(self) -> None:
        if _place(self.param) != _place(self.data):
            self.param.data = self.data
        if self.param.requires_grad != self.requires_grad:
            self.param.requires_grad_(self.requires_grad)
        if self.param.grad is not self.grad:
            self.param.grad = self.grad
        for hooks in self.hooks:
            hooks.put_back()


class _Value(NamedTuple):
    """A tensor that trials may write: where its numbers lay, and a copy of them."""

    name: str
    tensor: torch.Tensor
    data: torch.Tensor
    value: torch.Tensor

    def put_back(self) -> None:
        if _place(self.tensor) != _place(self.data):
            self.tensor.data = self.data
        self.tensor.copy_(self.value)


class ModelState:
    """What `walked` found, to be put back as often as needed.

    changing: parameters that trials write though they are frozen as found. unchanged: those that trials replace, so
    that nothing ever writes the ones found. also: other mappings to be put back, such as an adapter's configuration.
    """

    def __init__(
        self,
        walked: Walk,
        *,
        changing: Iterable[torch.Tensor] = (),
        unchanged: Iterable[torch.Tensor] = (),
        also: Iterable[MutableMapping[str, Any]] = (),
    ) -> None:
        written, replaced = {id(p) for p in changing}, {id(p) for p in unchanged}
        self._held = [held for name, module in walked.modules for held in _held_by(name, module)]
        self._held += [_Held("an adapter's configuration", mapping, dict(mapping)) for mapping in also]
        self._params = [_switches(name, param) for name, param in walked.parameters]
        changes = ((n, p) for n, p in walked.parameters if p.requires_grad or id(p) in written)
        kept = [*((n, p) for n, p in changes if id(p) not in replaced), *_loose_tensors(walked)]
        self._values = [_Value(n, t, t.data, t.detach().clone()) for n, t in kept if _is_writable(t)]
        copied = {id(entry.tensor) for entry in self._values} | replaced
        self._frozen = [(n, p, _version(p)) for n, p in walked.parameters if id(p) not in copied]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the model what it was. Where that is broken off, all of it is done once more, each part by itself.

        Raises:
            CalibrationError: it names what could not be put back.
        """
        entries: list[_Held | _Param | _Value] = [*self._held, *self._params, *self._values]
        try:
            for entry in entries:
                entry.put_back()
            return
        except BaseException as error:
            first = error
        left = []
        for entry in entries:
            try:
                entry.put_back()
            except Exception:
                left.append(entry.name)
        if left:
            raise CalibrationError(
                f"These parts of the model could not be put back, all others were: {', '.join(dict.fromkeys(left))}.",
                "Load the model again, or give these parts their values by hand.",
            ) from first
        if not isinstance(first, Exception):
            raise first

    def drop_gradients(self) -> None:
        """Part the parameters from the gradients found, so that no trial adds to these."""
        for entry in self._params:
            entry.param.grad = None

    def check_frozen(self) -> None:
        """Refuse to go on where a weight that is frozen, and so was not copied, was written in place.

        Writing through `.data` cannot be seen.
        """
        for name, param, version in self._frozen:
            if _version(param) != version:
                raise CalibrationError(
                    f"step wrote the frozen parameter {name}, of which there is no copy to put back.",
                    "Let it require a gradient, or keep it as a buffer: those are copied.",
                )


def _held_by(name: str, module: nn.Module) -> Iterator[_Held]:
    """A module's own containers one level deep (parameters, buffers, hooks, dicts by adapter), then its attributes."""
    for key, value in vars(module).items():
        if isinstance(value, dict):
            yield _Held(f"{name}.{key}".lstrip("."), value, dict(value))
        elif isinstance(value, (list, set)):
            yield _Held(f"{name}.{key}".lstrip("."), value, value.copy())
    yield _Held(f"the attributes of {name or 'the model'}", vars(module), dict(vars(module)))


def _switches(name: str, param: torch.Tensor) -> _Param:
    hooks: list[Any] = [getattr(param, key, None) for key in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    held = tuple(_Held(name, live, dict(live)) for live in (*hooks, vars(param)) if isinstance(live, dict))
    return _Param(name, param, param.data, param.requires_grad, param.grad, held)


def _loose_tensors(walked: Walk) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers, and tensors that are plain attributes; each once, without quantised weights and views of parameters."""
    seen = {id(param) for _, param in walked.parameters}
    memory = {_memory(param) for _, param in walked.parameters}
    for name, module in walked.modules:
        for key, value in (*module._buffers.items(), *vars(module).items()):
            if not isinstance(value, torch.Tensor) or id(value) in seen or _memory(value) in memory:
                continue
            seen.add(id(value))
            if value.is_floating_point() or value.is_complex() or value.numel() <= _QUANTISED:
                yield f"{name}.{key}".lstrip("."), value


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The storage behind a tensor; a subclass without one, and an empty one, share theirs with nobody."""
    try:
        where = tensor.untyped_storage().data_ptr()
    except RuntimeError:
        where = 0
    return (tensor.device, where) if where else (id(tensor),)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Whether a trial could write the tensor in place, and we could write it back."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not (overlapping or tensor.is_meta or tensor.is_inference())


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's values lie and as what; a subclass without memory of its own is its own place."""
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape
    except RuntimeError:
        return (tensor.dtype, tensor.device, tensor.shape)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
