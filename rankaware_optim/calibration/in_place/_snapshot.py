"""A snapshot of a model, taken before trials change it, and restored bit for bit.

Frozen weights are not copied. What a trial may write is copied: parameters that train, buffers, and
tensors that modules hold as plain attributes. Everything else (attributes, containers, hooks,
modes, gradients, the identity of parameters) is kept by reference. Restoring it copies no memory
and may be done twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import CalibrationError
from ...inspection import Walk

# Larger integer tensors are quantised weights. They are frozen, and too large to copy.
_QUANTISED = 2**16


class _Held(NamedTuple):
    """A container, by identity, and its original content."""

    name: str
    container: Any
    content: Any

    def put_back(self) -> None:
        live, content = self.container, self.content
        if isinstance(live, list):
            live[:] = content
            return
        is_dict = not isinstance(live, set)
        if (
            is_dict
            and list(live) == list(content)
            and all(live[key] is value for key, value in content.items())
        ):
            return
        live.clear()
        live.update(content)


class _Param(NamedTuple):
    """A parameter's state without its values: its data pointer, requires_grad, gradient and hooks."""

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
    """A tensor that trials may write: its memory and a copy of its values."""

    name: str
    tensor: torch.Tensor
    data: torch.Tensor
    value: torch.Tensor

    def put_back(self) -> None:
        if _place(self.tensor) != _place(self.data):
            self.tensor.data = self.data
        self.tensor.copy_(self.value)


class ModelState:
    """The state of a model, which can be restored as often as needed.

    Args:
        walked: the model.
        changing: frozen parameters that trials write.
        unchanged: parameters that trials replace, so that the original ones are never written.
        also: other mappings to restore, such as an adapter's configuration.
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
        self._held += [
            _Held("an adapter's configuration", mapping, dict(mapping)) for mapping in also
        ]
        self._params = [_switches(name, param) for name, param in walked.parameters]
        changes = ((n, p) for n, p in walked.parameters if p.requires_grad or id(p) in written)
        kept = [*((n, p) for n, p in changes if id(p) not in replaced), *_loose_tensors(walked)]
        self._values = [
            _Value(n, t, t.data, t.detach().clone()) for n, t in kept if _is_writable(t)
        ]
        copied = {id(entry.tensor) for entry in self._values} | replaced
        # PEFT parametrizes experts in each forward pass, which counts as a write though no value
        # changes.
        experts = tuple(
            f"{name}." for name, module in walked.modules if hasattr(module, "parameter_name")
        )
        self._frozen = [
            (n, p, _version(p), _sum(p) if n.startswith(experts) else None)
            for n, p in walked.parameters
            if id(p) not in copied
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the model. If an error interrupts this, every part is restored again by itself.

        Raises:
            CalibrationError: some parts could not be restored. The message names them.
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
                "These parts of the model could not be restored, all others were:"
                f" {', '.join(dict.fromkeys(left))}.",
                "Load the model again, or set these parts by hand.",
            ) from first
        if not isinstance(first, Exception):
            raise first

    def drop_gradients(self) -> None:
        """Detach the original gradients from the parameters, so that no trial adds to them."""
        for entry in self._params:
            entry.param.grad = None

    def check_frozen(self) -> None:
        """Raise if a frozen weight, which was not copied, was written in place.

        Writes through `.data` cannot be detected.
        """
        for name, param, version, total in self._frozen:
            if _version(param) != version and (total is None or _sum(param) != total):
                raise CalibrationError(
                    f"step wrote the frozen parameter {name}, which has no copy and cannot be"
                    " restored.",
                    "Set its requires_grad, or keep it as a buffer: those are copied.",
                )


def _held_by(name: str, module: nn.Module) -> Iterator[_Held]:
    """Yield a module's containers one level deep (parameters, buffers, hooks, dicts by adapter) and
    its attributes.
    """
    for key, value in vars(module).items():
        if isinstance(value, dict):
            yield _Held(f"{name}.{key}".lstrip("."), value, dict(value))
        elif isinstance(value, (list, set)):
            yield _Held(f"{name}.{key}".lstrip("."), value, value.copy())
    yield _Held(f"the attributes of {name or 'the model'}", vars(module), dict(vars(module)))


def _switches(name: str, param: torch.Tensor) -> _Param:
    hooks: list[Any] = [
        getattr(param, key, None) for key in ("_backward_hooks", "_post_accumulate_grad_hooks")
    ]
    held = tuple(
        _Held(name, live, dict(live)) for live in (*hooks, vars(param)) if isinstance(live, dict)
    )
    return _Param(name, param, param.data, param.requires_grad, param.grad, held)


def _loose_tensors(walked: Walk) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield buffers and tensors in plain attributes, each once, without quantised weights and views
    of parameters.
    """
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
    """Return a key of the storage behind a tensor. It is unique for subclasses without one and for
    empty tensors.
    """
    try:
        where = tensor.untyped_storage().data_ptr()
    except RuntimeError:
        where = 0
    return (tensor.device, where) if where else (id(tensor),)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Return whether a trial could write the tensor in place, and whether it can be restored."""
    overlapping = any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return not (overlapping or tensor.is_meta or tensor.is_inference())


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key of a tensor's memory and its layout. A subclass without memory is its own key."""
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape
    except RuntimeError:
        return (tensor.dtype, tensor.device, tensor.shape)


def _sum(tensor: torch.Tensor) -> int | None:
    """Return the sum of a tensor's bits as whole numbers, which no NaN and no order changes. None
    without values.
    """
    if tensor.is_meta:
        return None
    bits = tensor.detach().flatten().view(torch.uint8)
    bits = bits.clone() if bits.storage_offset() % 8 else bits
    whole = bits.numel() // 8 * 8
    return int(bits[:whole].view(torch.int64).sum()) + int(
        bits[whole:].sum()
    )  # int64: without a copy of the bits


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
