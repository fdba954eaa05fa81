"""The state that every trial starts from, and that is put back after the last one.

A trial trains the user's own model, and may run the user's own trainer. Afterwards both must be as
they were. So everything that a trial may change is either put back, or watched, so that a change is
an error and never a surprise.
"""

from __future__ import annotations

import io
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from .._warn import warn
from ..errors import CalibrationError
from ..trainers import Touched
from ._storage import held_back

# A buffer of whole numbers with more entries than this holds packed weights. They do not train, so
# they are watched and not copied.
_PACKED = 65_536
# Other tensors are copied up to the first number of bytes, even if the weights that train take
# fewer, and those of modules beside the model at most up to the second.
_LEAST_COPIED, _MOST_BESIDE = 2**20, 2**28
_SAMPLE = 64  # compared entries of a watched tensor
# A container with more elements than this holds rows, and the contents of the rows are not looked
# into. The first number is for data, the second for trainers and modules.
_ROWS, _ENTRIES = 100, 10_000
_MOST_OBJECTS = 100_000  # objects of the data that are looked into
# Attributes with the settings of a module. Gradient checkpointing, for one, changes some.
_CONFIGURATIONS = ("config", "generation_config", "peft_config")
# Signs of tools that replace parameters or take them away: flags of trainers, names of classes
_FLAGS = ("is_fsdp_enabled", "is_deepspeed_enabled")
_REPLACING = {
    *_FLAGS,
    "FullyShardedDataParallel",
    "FSDPModule",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "DeepSpeedEngine",
    "DeepSpeedStrategy",
    "AdaLoraLayer",
}
_CURE = (
    "Pass a function of the trial that builds a model or a trainer for each trial, or use"
    " ra.suggest_lr's rate."
)


class Snapshot:
    """The state of everything that a trial may change, as it is now.

    Of every module, object and data set it holds the attributes, the contents of the containers in
    them, and the states of random generators. Of tensors it holds copies: of the weights that
    train, of buffers, and of other tensors while these take about as much memory as the weights
    that train, such as an average of the weights that a trainer keeps. All remaining tensors, such
    as frozen weights, are watched: a trial that changes one is an error.

    Args:
        touched: what a trial may change.

    Raises:
        CalibrationError: the model is sharded, its ranks are pruned, or the data can be read only
            once.
    """

    def __init__(self, touched: Touched) -> None:
        self._containers: list[_Container] = []
        # functions that put a random generator or an open file back
        self._put_backs: list[Callable[[], object]] = []
        # By id, because some containers cannot be hashed. An id stays valid while the object lives.
        self._seen: dict[int, object] = {}
        self._modules: dict[int, nn.Module] = {}
        tensors: list[torch.Tensor] = []
        for module in touched.modules:
            self._add_module(module, tensors)
        for each in touched.objects:
            _refuse_sharded(each)
            self._add(getattr(each, "__dict__", None), tensors)
        self._add_data(touched.data)
        params = dict.fromkeys(p for each in touched.modules for p in each.parameters())
        self._gradients = [(p, p.requires_grad, p.grad) for p in params]
        self._values: dict[torch.Tensor, torch.Tensor] = {}
        self._watched: list[_Watched] = []
        self._was_refused = False  # an error has said that a watched tensor changed
        self._keep_trained()
        trained = sum(map(_bytes_of, self._values))
        self._keep_buffers()
        self._keep_others(tensors, trained)
        self.size = sum(map(_bytes_of, self._values))

    # --- what is found ----------------------------------------------------------------------------

    def _add_module(self, module: nn.Module, tensors: list[torch.Tensor]) -> None:
        """Keep a module and those in it, and collect their tensors."""
        for each in module.modules():
            if id(each) in self._modules:
                continue
            self._modules[id(each)] = each
            _refuse_sharded(each)
            self._add(vars(each), tensors)
            for name in _CONFIGURATIONS:
                value = vars(each).get(name)
                settings = value.values() if isinstance(value, dict) else [value]
                for one in settings:
                    self._add(getattr(one, "__dict__", None), tensors)

    def _add(self, value: Any, tensors: list[torch.Tensor]) -> None:
        """Keep a container and all containers in it. Collect the tensors and modules in them."""
        if isinstance(value, nn.Module):
            self._add_module(value, tensors)
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, _CONTAINERS):
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                kept = _Container(value)
                self._containers.append(kept)
                for each in kept.elements(_ENTRIES):
                    self._add(each, tensors)
        elif _holds_tensors(value):  # such as an average of the weights
            self._add(vars(value), tensors)
        else:
            self._put_backs.extend(_state_of(value))

    def _add_data(self, data: Iterable[object]) -> None:
        """Keep data sets and everything that they refer to. Raise if one can be read only once.

        Objects of Python's own modules, such as threads and event loops, are not looked into.
        """
        pending, seen = [*data], dict[int, object]()
        while pending and len(seen) < _MOST_OBJECTS:
            value = pending.pop()
            if id(value) in seen or isinstance(value, _NOT_DATA):
                continue
            seen[id(value)] = value
            if isinstance(value, _CONTAINERS):
                kept = _Container(value)
                self._containers.append(kept)
                pending.extend(kept.elements(_ROWS))
            elif states := [*_state_of(value)]:
                self._put_backs.extend(states)
            else:
                _refuse_iterator(value)
                pending.extend(_parts_of(value))
        for each in data:
            self._refuse_single_pass(each)

    def _refuse_single_pass(self, data: Any) -> None:
        """Raise a `CalibrationError` for data whose `iter` returns the same object twice. What its
        `__iter__` changes, such as the order of its rows, is put back.
        """
        is_sized = hasattr(data, "__len__") and not isinstance(data, IterableDataset)
        if is_sized or not hasattr(type(data), "__iter__"):
            return
        is_same = iter(data) is iter(data)
        self._put_back_objects()
        if is_same:
            _refuse_one_pass(data)

    # --- tensors ----------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep_trained(self, *hooked: object) -> None:
        """Copy the weights that train. It is called before every step too, because a loop may let
        weights train that were frozen at the start.
        """
        for param, _, _ in self._gradients:
            if param.requires_grad:
                self._keep(param)

    def _keep(self, tensor: torch.Tensor) -> None:
        if tensor not in self._values:
            self._values[tensor] = tensor.detach().clone()

    def _keep_buffers(self) -> None:
        for module in self._modules.values():
            for buffer in module.buffers(recurse=False):
                if buffer.is_floating_point() or buffer.numel() <= _PACKED:
                    self._keep(buffer)

    def _keep_others(self, tensors: Iterable[torch.Tensor], trained: int) -> None:
        """Copy the smallest of the other tensors, and watch the rest.

        An average of the weights takes as much memory as they do. So plain tensors may take as much
        in all, and so may parameters of modules beside the model, up to a limit: a reference or
        reward model is one too, and must not be copied. Of the model's own frozen weights only
        small ones are.

        Args:
            tensors: all that were found.
            trained: bytes of the weights that train.
        """
        own = {id(param) for param, _, _ in self._gradients}
        left = {
            "plain": max(_LEAST_COPIED, trained),
            "beside": max(_LEAST_COPIED, min(trained, _MOST_BESIDE)),
            "own": _LEAST_COPIED,
        }
        others = {id(t): t for t in tensors if t not in self._values}
        for tensor in sorted(others.values(), key=_bytes_of):
            kind = "own" if id(tensor) in own else "beside"
            if not isinstance(tensor, nn.Parameter):
                kind = "plain"
            left[kind] -= _bytes_of(tensor)
            if left[kind] >= 0 and _can_be_copied(tensor):
                self._keep(tensor)
            else:
                self._watched.append(_Watched(tensor))

    def _changed(self) -> str:
        """Return which tensors were changed that are not copied, in words; "" if none were."""
        changed = [each for each in self._watched if each.has_changed(self._values)]
        if not changed:
            return ""
        return (
            f"A trial changed {len(changed)} tensors that do not train, such as"
            f" {self._name_of(changed[0].tensor)}. They were not copied, so they keep their new"
            " values."
        )

    def _name_of(self, tensor: torch.Tensor) -> str:
        for module in self._modules.values():
            for name, each in (*module.named_parameters(), *module.named_buffers()):
                if each is tensor:
                    return name
        return f"one of shape {tuple(tensor.shape)}"

    def _refuse_changed(self) -> None:
        """Raise a `CalibrationError` if a tensor was changed that is not copied."""
        if changed := self._changed():
            self._was_refused = True
            raise CalibrationError(changed, f"Load the model again. {_CURE}")

    # --- putting back -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Put the state back for the next trial. Every trial begins without gradients."""
        self._put_back()
        self._refuse_changed()
        for param, _, _ in self._gradients:
            param.grad = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put everything back at the end of the context, also after an error. Ctrl-C waits for
        it.
        """
        hook = register_optimizer_step_pre_hook(self._keep_trained)
        try:
            try:
                yield
            finally:
                hook.remove()
                self._end()
        except KeyboardInterrupt:
            # Ctrl-C may have come after the block and before `_end` held signals back
            self._end()
            raise
        self._refuse_changed()

    def _end(self) -> None:
        with held_back(math.inf):
            self._put_back()
            # an error is on its way out already, so this is a warning beside it
            is_failing = sys.exc_info()[0] is not None and not self._was_refused
            if is_failing and (changed := self._changed()):
                warn(changed)

    @torch.no_grad()
    def _put_back(self) -> None:
        self._put_back_objects()
        for tensor, value in self._values.items():
            tensor.copy_(value)
        for param, requires_grad, grad in self._gradients:
            param.requires_grad_(requires_grad)
            param.grad = grad

    def _put_back_objects(self) -> None:
        for each in self._containers:
            each.put_back()
        for put_back in self._put_backs:
            put_back()


# --- a container and a tensor ---------------------------------------------------------------------

_CONTAINERS = (dict, list, deque, set)
_NOT_DATA = (nn.Module, torch.Tensor, type, _BaseDataLoaderIter)


class _Container:
    """A container and what it holds now.

    It is written to only if it has changed. An unchanged one may forbid to be written to.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.contents: Any = dict(value) if isinstance(value, dict) else [*value]

    def elements(self, most: int) -> Sequence[Any]:
        """Return the elements to look into: none of them if there are more than `most`."""
        if len(self.contents) > most:
            return ()
        is_dict = isinstance(self.value, dict)
        return [*(self.contents.values() if is_dict else self.contents)]

    def has_changed(self) -> bool:
        if len(self.value) != len(self.contents):
            return True
        if isinstance(self.value, set):
            return self.value != {*self.contents}
        now, kept = self.value, self.contents
        if isinstance(self.value, dict):
            if [*now] != [*kept]:
                return True
            now, kept = now.values(), kept.values()
        # the same objects: to compare their contents may be expensive, as of tensors
        return any(a is not b for a, b in zip(now, kept, strict=True))

    def put_back(self) -> None:
        if not self.has_changed():
            return
        value = self.value
        try:
            if isinstance(value, list):
                value[:] = self.contents
                return
            add = value.extend if isinstance(value, deque) else value.update
            # A FrozenDict of diffusers can be emptied but not filled, and raises an error here. So
            # it is found before it is emptied.
            add([])
        except Exception as error:
            warn(f"A trial changed a {type(value).__name__}. It stays so: {error}")
            return
        value.clear()
        add(self.contents)


class _Watched:
    """A tensor that is not copied, and two signs of a write to it.

    Torch counts the writes to a tensor in its version, but not those through `.data`, by which many
    loops merge weights. A sample of the entries shows these.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._version, self._sample = self._now()

    def _now(self) -> tuple[int, torch.Tensor | None]:
        version = 0 if self.tensor.is_inference() else self.tensor._version
        # A meta tensor has no values, and a quantized one may have no view.
        with suppress(Exception):
            if self.tensor.is_contiguous():
                flat = self.tensor.detach().view(-1)
                stride = max(1, flat.numel() // _SAMPLE)
                return version, flat[::stride].cpu().clone()
        return version, None

    def has_changed(self, copied: Container[torch.Tensor]) -> bool:
        if self.tensor in copied:  # a trial let this frozen weight train
            return False
        version, sample = self._now()
        if version != self._version:
            return True
        both = sample is not None and self._sample is not None
        return both and not torch.equal(sample, self._sample)  # type: ignore[arg-type]


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _can_be_copied(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a plain one that can be written to. A quantized weight is of a
    class of its own.
    """
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter)
    is_strided = tensor.layout == torch.strided and not tensor.is_meta
    expanded = is_strided and 0 in tensor.stride()
    return is_plain and is_strided and not expanded and not tensor.is_inference()


def _state_of(value: Any) -> Iterator[Callable[[], object]]:
    """Yield a function that puts back a random generator, or the position in an open file."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        yield partial(value.set_state, value.get_state())  # type: ignore[arg-type]
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        bits = value.bit_generator
        yield partial(setattr, bits, "state", bits.state)
    elif isinstance(value, io.IOBase):
        with suppress(Exception):  # a closed file, or a pipe
            if value.seekable():
                yield partial(value.seek, value.tell())


def _holds_tensors(value: object) -> bool:
    """Return whether an object has a tensor, or a list or dict of tensors, as an attribute."""
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return False
    for each in attributes.values():
        elements = each.values() if isinstance(each, dict) else each
        is_container = isinstance(each, (dict, list)) and len(each) > 0
        first = next(iter(elements)) if is_container else each
        if isinstance(first, torch.Tensor):
            return True
    return False


def _parts_of(value: Any) -> Iterator[object]:
    """Yield the objects that an object of the data refers to."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, tuple):
        yield from value
    elif package not in sys.stdlib_module_names:
        yield getattr(value, "__dict__", None)


# --- what cannot be put back ----------------------------------------------------------------------


def _refuse_sharded(owner: Any) -> None:
    """Raise a `CalibrationError` for a module, a strategy or a trainer that replaces parameters, or
    takes them away.
    """
    signs = {kind.__name__ for kind in type(owner).__mro__}
    signs |= {name for name in _FLAGS if getattr(owner, name, False)}
    params = [*owner.parameters(recurse=False)] if isinstance(owner, nn.Module) else []
    sharded = [p for p in params if hasattr(p, "to_local") or hasattr(p, "ds_id")]
    if signs & _REPLACING or sharded:
        raise CalibrationError(
            "The model cannot be put back after a trial: FSDP or DeepSpeed shards it, or AdaLoRA"
            " prunes its ranks.",
            _CURE,
        )


def _refuse_iterator(value: object) -> None:
    """Raise a `CalibrationError` for an iterator in the data, which a trial would use up."""
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        _refuse_one_pass(value)


def _refuse_one_pass(data: object) -> None:
    raise CalibrationError(
        f"The data hold a {type(data).__name__}, an iterator that can be read only once. The trials"
        " would use it up.",
        "Use data that begin again whenever they are iterated, such as a class whose __iter__ is a"
        " generator function that opens its source.",
    )
