"""This module saves the state of the model and the trainer before the first trial of a
calibration, and restores this state after the last trial.

A trial trains the user's model and may run the user's trainer. After a calibration, the
user's model and trainer must be unchanged. This module therefore restores every object
and tensor that a trial may change. Tensors that are too large to copy are checked for
changes instead, and a trial that changes such a tensor raises an error.
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

# An integer buffer with more entries than this contains packed (quantized) weights. Packed
# weights do not train, so they are watched for changes instead of copied.
_PACKED = 65_536
# Limits in bytes on the copies of other tensors. The first amount is always allowed, even if
# the trainable weights need less memory. The second amount is the most that copies of modules
# outside the model may need.
_LEAST_COPIED, _MOST_BESIDE = 2**20, 2**28
_SAMPLE = 64  # the number of entries of a watched tensor that are compared
# A container with more elements than this probably contains the rows of a data set, and the
# rows are not searched. The first limit is for data, the second for trainers and modules.
_ROWS, _ENTRIES = 100, 10_000
_MOST_OBJECTS = 100_000  # the number of objects in the data that are searched
# Attributes that contain the settings of a module. A trial may change them, for example when
# it turns on gradient checkpointing.
_CONFIGURATIONS = ("config", "generation_config", "peft_config")
# Signs of tools that replace or remove parameters: flags of trainers and names of classes
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


class Snapshot:
    """Saves the current state of all objects and tensors that a trial of a calibration
    may change.

    A snapshot contains the attributes of all modules, objects and data sets, the
    contents of the lists and dicts in these attributes, and the states of random
    generators. A snapshot also contains copies of the model's trainable weights and
    buffers. Other small tensors, such as a trainer's average of the trainable weights,
    are copied as well. If a trial changes a tensor that was not copied, such as a
    frozen weight, the snapshot raises an error.

    Args:
        touched: the modules, objects and data that a trial may change.

    Raises:
        CalibrationError: the model is sharded, AdaLoRA prunes its ranks, or the data can be
            read only once.
    """

    def __init__(self, touched: Touched) -> None:
        self._containers: list[_Container] = []
        # functions that restore the state of a random generator or of an open file
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
        # whether an error has already reported that a watched tensor changed
        self._was_refused = False
        self._keep_trained()
        trained = sum(map(_bytes_of, self._values))
        self._keep_buffers()
        self._keep_others(tensors, trained)
        self.size = sum(map(_bytes_of, self._values))

    # --- saving the state -------------------------------------------------------------------------

    def _add_module(self, module: nn.Module, tensors: list[torch.Tensor]) -> None:
        """Save the state of a module and its submodules, and collect their tensors."""
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
        """Save the contents of a container, such as a list, and of all containers
        inside it, and collect their tensors.
        """
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
        """Save the state of the data sets and of all objects that they refer to.

        The method does not search inside objects of the Python standard library, such
        as threads and event loops.

        Raises:
            CalibrationError: a data set can be read only once.
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
        """Raise a `CalibrationError` if two calls of `iter` on the training data return
        the same object.
        """
        is_sized = hasattr(data, "__len__") and not isinstance(data, IterableDataset)
        if is_sized or not hasattr(type(data), "__iter__"):
            return
        # __iter__ may change the data, for example shuffle its rows, so the state is restored
        is_same = iter(data) is iter(data)
        self._put_back_objects()
        if is_same:
            _refuse_one_pass(data)

    # --- tensors ----------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep_trained(self, *hooked: object) -> None:
        """Copy the trainable weights.

        This method is also called before every optimizer step, because a training loop may
        unfreeze weights during a trial.
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
        """Copy the small tensors that have no copy yet, and watch the larger tensors
        for changes.

        The copies of tensors that are not parameters may need as much memory as the
        trainable weights, because a moving average of the weights has this size. The
        copies of parameters outside the model may also need this much memory, but only
        up to a fixed limit. Reference models and reward models are too large to be
        copied. Frozen weights of the model are copied only if they are very small.

        Args:
            tensors: all tensors that were found.
            trained: the size of the trainable weights, in bytes.
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

    def _name_of(self, tensor: torch.Tensor) -> str:
        for module in self._modules.values():
            for name, each in (*module.named_parameters(), *module.named_buffers()):
                if each is tensor:
                    return name
        return f"one of shape {tuple(tensor.shape)}"

    def _refuse_changed(self) -> None:
        """Raise a `CalibrationError` if a trial changed a tensor of which the snapshot
        has no copy.
        """
        changed = [each for each in self._watched if each.has_changed(self._values)]
        if changed:
            self._was_refused = True
            name = self._name_of(changed[0].tensor)
            raise CalibrationError(
                f"A trial changed tensors that do not train ({len(changed)} in all), such as"
                f" {name}. calibrate() has no copy of these tensors, so it cannot restore them.",
                "Load the model again before you use it. To calibrate, pass a function that builds"
                " a new model or trainer for each trial.",
            )

    # --- restoring the state ----------------------------------------------------------------------

    def begin(self) -> None:
        """Restore the saved state of the model and clear its gradients before the next
        trial.
        """
        self._put_back()
        self._refuse_changed()
        for param, _, _ in self._gradients:
            param.grad = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the saved state of the model and the trainer when the context ends,
        even after an error.

        Ctrl-C takes effect only after the saved state has been restored.
        """
        hook = register_optimizer_step_pre_hook(self._keep_trained)
        try:
            try:
                yield
            finally:
                hook.remove()
                self._end()
        except KeyboardInterrupt:
            # Ctrl-C may have come after the block, but before `_end` delayed signals
            self._end()
            raise
        self._refuse_changed()

    def _end(self) -> None:
        with held_back(math.inf):
            self._put_back()
            # A different error is already being raised, so this one becomes a warning.
            if sys.exc_info()[0] is not None and not self._was_refused:
                try:
                    self._refuse_changed()
                except CalibrationError as changed:
                    warn(str(changed))

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
    """Saves the current contents of a list, dict, deque or set.

    The saved contents are restored only if the container has changed, because some
    containers are read-only.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.contents: Any = dict(value) if isinstance(value, dict) else [*value]

    def elements(self, most: int) -> Sequence[Any]:
        """Return the elements of the container, or nothing if it has more than `most`
        elements.
        """
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
        # Compare only the identity of the elements. Comparing their contents may be expensive,
        # for example if they are tensors.
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
            # A FrozenDict of diffusers can be emptied, but adding to it raises an error. Add
            # nothing first, so that the error is raised before the dict is emptied.
            add([])
        except Exception as error:
            kind = type(value).__name__
            warn(
                f"A trial changed the contents of a {kind}, and calibrate() could not restore them,"
                f" because of this error: {error}. Build the model or trainer that contains this"
                f" {kind} again before you use it."
            )
            return
        value.clear()
        add(self.contents)


class _Watched:
    """Detects changes of a tensor that is too large to copy.

    Torch increases the version number of a tensor with every in-place change. Changes
    through `.data` do not increase the version number, but many training loops merge
    weights this way. This class therefore also compares some entries of the tensor with
    the values that they had before the trial.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._version, self._sample = self._now()

    def _now(self) -> tuple[int, torch.Tensor | None]:
        version = 0 if self.tensor.is_inference() else self.tensor._version
        # A meta tensor has no values, and a quantized tensor may not support view().
        with suppress(Exception):
            if self.tensor.is_contiguous():
                flat = self.tensor.detach().view(-1)
                stride = max(1, flat.numel() // _SAMPLE)
                return version, flat[::stride].cpu().clone()
        return version, None

    def has_changed(self, copied: Container[torch.Tensor]) -> bool:
        if self.tensor in copied:  # a trial has unfrozen this weight, so it was copied
            return False
        version, sample = self._now()
        if version != self._version:
            return True
        both = sample is not None and self._sample is not None
        return both and not torch.equal(sample, self._sample)  # type: ignore[arg-type]


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _can_be_copied(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is an ordinary tensor with values that can be overwritten."""
    # quantized weights are subclasses of Tensor or Parameter
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter)
    is_strided = tensor.layout == torch.strided and not tensor.is_meta
    expanded = is_strided and 0 in tensor.stride()
    return is_plain and is_strided and not expanded and not tensor.is_inference()


def _state_of(value: Any) -> Iterator[Callable[[], object]]:
    """Yield a function that restores the state of a random generator or the position in
    an open file.
    """
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
    """Yield all objects to which an object in a data set refers."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, tuple):
        yield from value
    elif package not in sys.stdlib_module_names:
        yield getattr(value, "__dict__", None)


# --- what cannot be restored ----------------------------------------------------------------------


def _refuse_sharded(owner: Any) -> None:
    """Raise a `CalibrationError` if FSDP, DeepSpeed or AdaLoRA replaces the parameters."""
    signs = {kind.__name__ for kind in type(owner).__mro__}
    signs |= {name for name in _FLAGS if getattr(owner, name, False)}
    params = [*owner.parameters(recurse=False)] if isinstance(owner, nn.Module) else []
    sharded = [p for p in params if hasattr(p, "to_local") or hasattr(p, "ds_id")]
    if "AdaLoraLayer" in signs:
        raise CalibrationError(
            "calibrate() cannot restore the model after a trial, because AdaLoRA prunes its ranks.",
            "Pass a function that builds a new model or trainer for each trial, or use"
            " ra.suggest_lr(trainer), which runs no trials.",
        )
    if signs & _REPLACING or sharded:
        raise CalibrationError(
            "calibrate() cannot restore the model after a trial, because FSDP or DeepSpeed shards"
            " it.",
            "Pass a function that builds a new model or trainer for each trial, or use"
            " ra.suggest_lr(trainer), which runs no trials.",
        )


def _refuse_iterator(value: object) -> None:
    """Raise a `CalibrationError` if a data set contains an iterator."""
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        _refuse_one_pass(value)


def _refuse_one_pass(data: object) -> None:
    raise CalibrationError(
        f"The training data contain a {type(data).__name__}, which is an iterator that can be read"
        " only once, but every trial must read the data again.",
        "Use a list, or a dataset class whose __iter__ method opens the data source again.",
    )
