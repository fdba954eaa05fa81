"""A snapshot of a model, taken before trials change it, and restored bit for bit.

Frozen weights are not copied. What a trial may write is copied: parameters that train, buffers, and
tensors that modules hold as plain attributes. Everything else (attributes, containers, hooks,
modes, gradients, the identity of parameters) is kept by reference. Restoring it copies no memory
and may be done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from ..inspection import Walk

# Larger integer tensors are quantised weights. They are frozen, and too large to copy.
_QUANTISED = 2**16

_Undo = tuple[str, Callable[[], Any]]
"""The name of a part of the model, and a function that restores it."""


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
        self._parameters = walked.parameters
        self._undo: list[_Undo] = []
        for name, module in walked.modules:
            self._undo += _containers(name, module)
        for mapping in also:
            self._undo.append(_refilling("an adapter's configuration", mapping))
        for name, param in walked.parameters:
            self._undo += _switches(name, param)
        safe = set(map(id, unchanged))
        for name, tensor in _writable(walked, changing):
            if id(tensor) not in safe:
                safe.add(id(tensor))
                value = tensor.detach().clone()
                self._undo.append(
                    (name, partial(_restore_value, tensor, tensor.data, value))
                )
        self._frozen = [
            (name, param, _version(param), total)
            for name, param, total in _sums(walked)
            if id(param) not in safe
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the model. If an error interrupts this, every part is restored again by itself.

        Raises:
            CalibrationError: some parts could not be restored. The message names them.
        """
        try:
            for _, restore in self._undo:
                restore()
            return
        except BaseException as error:
            first = error
        failed: dict[str, None] = {}
        for name, restore in self._undo:
            try:
                restore()
            except Exception:
                failed[name] = None
        if failed:
            raise CalibrationError(
                "These parts of the model could not be restored, all others were:"
                f" {', '.join(failed)}.",
                "Load the model again, or set these parts by hand.",
            ) from first
        if not isinstance(first, Exception):
            raise first

    def drop_gradients(self) -> None:
        """Detach the original gradients from the parameters, so that no trial adds to them."""
        for _, param in self._parameters:
            param.grad = None

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


# --- containers -----------------------------------------------------------------------------------


def _containers(name: str, module: nn.Module) -> Iterator[_Undo]:
    """Yield a module's containers one level deep (parameters, buffers, hooks, dicts by adapter) and
    its attributes.
    """
    for key, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            yield _refilling(f"{name}.{key}".lstrip("."), value)
    yield _refilling(f"the attributes of {name or 'the model'}", vars(module))


def _refilling(name: str, container: Any) -> _Undo:
    kind = next((kind for kind in (list, set) if isinstance(container, kind)), dict)
    return name, partial(_refill, container, kind(container))


def _refill(container: Any, content: Any) -> None:
    if isinstance(content, list):
        container[:] = content
        return
    if not _is_filled(container, content):
        container.clear()
        container.update(content)


def _is_filled(container: Any, content: Any) -> bool:
    if isinstance(content, set) or list(container) != list(content):
        return False
    return all(container[key] is value for key, value in content.items())


# --- tensors --------------------------------------------------------------------------------------


def _switches(name: str, param: torch.Tensor) -> Iterator[_Undo]:
    """Yield a parameter's state without its values: its data pointer, requires_grad, gradient and
    hooks.
    """
    yield (
        name,
        partial(_restore_switches, param, param.data, param.requires_grad, param.grad),
    )
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    for container in (*(getattr(param, key, None) for key in hooks), vars(param)):
        if isinstance(container, dict):
            yield _refilling(name, container)


def _restore_switches(
    param: torch.Tensor,
    data: torch.Tensor,
    requires_grad: bool,
    grad: torch.Tensor | None,
) -> None:
    _restore_data(param, data)
    if param.requires_grad != requires_grad:
        param.requires_grad_(requires_grad)
    if param.grad is not grad:
        param.grad = grad


def _restore_value(
    tensor: torch.Tensor, data: torch.Tensor, value: torch.Tensor
) -> None:
    _restore_data(tensor, data)
    tensor.copy_(value)


def _restore_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    if _place(tensor) != _place(data):
        tensor.data = data


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key of a tensor's memory and layout. A subclass without memory is its own key."""
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape
    except RuntimeError:
        return tensor.dtype, tensor.device, tensor.shape


def _writable(
    walked: Walk, changing: Iterable[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a trial could write in place, and what can be restored: parameters that train or
    are `changing`, buffers, and tensors in plain attributes. Quantised weights and views of
    parameters are left out.
    """
    written = set(map(id, changing))
    for name, param in walked.parameters:
        if (param.requires_grad or id(param) in written) and _is_writable(param):
            yield name, param
    memory = {_memory(param) for _, param in walked.parameters}
    for name, tensor in _loose_tensors(walked):
        if _memory(tensor) not in memory and _is_writable(tensor):
            yield name, tensor


def _loose_tensors(walked: Walk) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield buffers and tensors in plain attributes, without quantised weights."""
    for name, module in walked.modules:
        for key, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, torch.Tensor) and not _is_quantised(value):
                yield f"{name}.{key}".lstrip("."), value


def _is_quantised(tensor: torch.Tensor) -> bool:
    is_whole = not (tensor.is_floating_point() or tensor.is_complex())
    return is_whole and tensor.numel() > _QUANTISED


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
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    overlaps = any(stride == 0 and size > 1 for stride, size in sizes)
    return not (overlaps or tensor.is_meta or tensor.is_inference())


def _sums(walked: Walk) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Yield parameters, those of experts with their sums: PEFT parametrizes experts in each forward
    pass, which counts as a write though no value changes.
    """
    layers = tuple(
        f"{n}." for n, module in walked.modules if hasattr(module, "parameter_name")
    )
    for name, param in walked.parameters:
        yield name, param, _sum(param) if name.startswith(layers) else None


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sum(tensor: torch.Tensor) -> int | None:
    """Return the sum of a tensor's bits as whole numbers, which no NaN and no order changes. None
    without values.
    """
    if tensor.is_meta:
        return None
    bits = tensor.detach().flatten().view(torch.uint8)
    bits = bits.clone() if bits.storage_offset() % 8 else bits
    whole = bits.numel() // 8 * 8  # int64 needs no copy of the bits
    return int(bits[:whole].view(torch.int64).sum()) + int(bits[whole:].sum())
