"""What a trial of a built model may change, put back as often as needed."""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import calibration
from ..errors import CalibrationError
from ._run import is_sized

if TYPE_CHECKING:
    from ..calibration import Trial

# Containers within an attribute's container that are put back: such as metrics by mode and name
_DEPTH = 2
# Entries of a container above which it is data, whose rows nobody replaces
_DATA = 10_000
# Entries of a buffer of whole numbers above which it is packed weights, which nothing trains
_PACKED = 65_536
_CONFIGS = ("config", "generation_config")
_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
_PARTS_OF_DATA = (Dataset, Sampler, DataLoader)
# What replaces parameters, or takes them away, by the names of classes
_SHARDING = {
    "FullyShardedDataParallel",
    "FSDPModule",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "DeepSpeedEngine",
    "DeepSpeedStrategy",
}
PutBack = Callable[[], Any]


class Snapshot:
    """The state of models, of other objects and of the random generators, as it is now.

    Of a module and of an object it is every attribute, with what its containers hold: hooks, a
    replaced forward, flags, generators. Of a model it is also what trains: values, gradients, and
    what requires one. Only the values of weights that train and of buffers are copied.

    Args:
        models: the models.
        objects: what else a trial may change, such as a trainer.
        data: data sets, loaders and collators. Of them and of the data sets and samplers in them
            it is the attributes only, such as a generator.

    Raises:
        CalibrationError: a model is sharded or its ranks are pruned, or data can be read once.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        objects: Iterable[Any] = (),
        data: Iterable[Any] = (),
    ) -> None:
        modules = [*dict.fromkeys(m for model in models for m in model.modules())]
        parts = _with_parts(data)
        for module in modules:
            refuse_sharded(module)
        for part in parts:
            refuse_iterator(part)
        self._put_backs = [*_put_backs([*modules, *objects], parts)]
        params = dict.fromkeys(p for m in modules for p in m.parameters(recurse=False))
        self._gradients = [(p, p.requires_grad, p.grad) for p in params]
        self._values: dict[torch.Tensor, torch.Tensor] = {}
        self._keep_trained()
        self.size = sum(t.numel() * t.element_size() for t in self._values)
        self._keep_buffers(modules)
        of_process = (torch.default_generator, random._inst, np.random.mtrand._rand)
        self._random: list[PutBack] = []
        for generator in (*of_process, *torch.cuda.default_generators):
            self._random += _kept_state(generator)

    def begin(self, trial: Trial) -> None:
        """Put the state back for a trial, which begins without gradients. Before it makes its
        optimizer, the values of weights that were frozen and now train are copied too.
        """
        self._put_back()
        for param, _, _ in self._gradients:
            param.grad = None
        make = trial.optimizer

        def optimizer(params: Any, /, **settings: Any) -> Any:
            self._keep_trained()
            return make(params, **settings)

        trial.optimizer = optimizer  # type: ignore[method-assign]

    def _keep_trained(self) -> None:
        for param, _, _ in self._gradients:
            if param.requires_grad:
                self._keep(param)

    def _keep_buffers(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for buffer in module.buffers(recurse=False):
                if buffer.is_floating_point() or buffer.numel() <= _PACKED:
                    self._keep(buffer)

    def _keep(self, tensor: torch.Tensor) -> None:
        if tensor not in self._values:
            self._values[tensor] = tensor.detach().clone()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put everything back at the end of the context, however it ends. Ctrl-C waits for it."""
        try:
            try:
                yield
            finally:
                self._end()
        except KeyboardInterrupt:
            self._end()  # Ctrl-C may have come just before signals were held back
            raise

    def _end(self) -> None:
        with calibration.held_back(math.inf):
            self._put_back()
            for put_back in self._random:
                put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        for put_back in self._put_backs:
            put_back()
        for tensor, value in self._values.items():
            tensor.copy_(value)
        for param, requires_grad, grad in self._gradients:
            param.requires_grad_(requires_grad)
            param.grad = grad


def _with_parts(data: Iterable[Any]) -> list[Any]:
    """Return data sets and loaders, and what is an attribute of them: data sets, samplers and
    collators.
    """
    queue = [*data]
    known: dict[int, Any] = {}
    while queue:
        each = queue.pop()
        if each is None or id(each) in known:
            continue
        known[id(each)] = each
        for name, value in getattr(each, "__dict__", {}).items():
            parts = value if isinstance(value, (list, tuple)) else [value]
            queue += [p for p in parts if isinstance(p, _PARTS_OF_DATA)]
            queue += [value] if name == "collate_fn" else []
    return [*known.values()]


# --- attributes -----------------------------------------------------------------------------------


def _put_backs(objects: Iterable[Any], data: Iterable[Any]) -> Iterator[PutBack]:
    """Yield what puts back the attributes of objects, and of data, whose rows stay."""
    seen = {id(each) for each in data}  # objects may hold each other
    for each in data:
        yield from _kept(getattr(each, "__dict__", None), 0, seen)
    for each in objects:
        configs = [getattr(each, name, None) for name in _CONFIGS]
        for owner in (each, *configs):
            yield from _kept(getattr(owner, "__dict__", None), 1 + _DEPTH, seen)


def _kept(value: Any, depth: int, seen: set[int]) -> Iterator[PutBack]:
    """Yield what puts back a value: a container with the containers in it down to a depth, or a
    state.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    if type(value) not in _CONTAINERS:
        yield from _kept_state(value)
    elif depth >= 0 and len(value) <= _DATA:
        yield partial(_refill, value, copy.copy(value))
        is_dict = isinstance(value, dict)
        for each in [*value.values()] if is_dict else [*value]:
            yield from _kept(each, depth - 1, seen)


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    fill = container.extend if hasattr(container, "extend") else container.update
    fill(contents)


def _kept_state(value: Any) -> Iterator[PutBack]:
    """Yield what puts back a random generator or a number in a tensor, such as a loss scale."""
    if isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.RandomState):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, np.random.Generator):
        bits = value.bit_generator
        yield partial(setattr, bits, "state", bits.state)
    elif _is_number(value):
        yield partial(value.copy_, value.clone())


def _is_number(value: Any) -> bool:
    """Return whether a value is a number in a tensor that does not train."""
    is_one = isinstance(value, torch.Tensor) and value.numel() == 1
    return is_one and not value.requires_grad and not value.is_meta


# --- what cannot be put back ----------------------------------------------------------------------


def refuse_sharded(owner: Any) -> None:
    """Raise a `CalibrationError` for a module or a strategy that replaces parameters, or takes them
    away.
    """
    kinds = {kind.__name__ for kind in type(owner).__mro__}
    params = [*owner.parameters(recurse=False)] if isinstance(owner, nn.Module) else []
    sharded = [p for p in params if hasattr(p, "to_local") or hasattr(p, "ds_id")]
    if kinds & _SHARDING or sharded:
        raise cannot_be_put_back("FSDP or DeepSpeed shards it")
    if "AdaLoraLayer" in kinds:
        raise cannot_be_put_back("AdaLoRA prunes its ranks while it trains")


def cannot_be_put_back(why: str) -> CalibrationError:
    """Return the error for a model that a trial would change for good."""
    return CalibrationError(
        f"The model cannot be put back after a trial: {why}.",
        "Give calibrate a function of the trial that builds a model or a trainer for each, or take"
        " ra.suggest_lr's rate.",
    )


def refuse_iterator(data: Any) -> None:
    """Raise a `CalibrationError` for a stream that can be read once: a trial would use it up."""
    if is_sized(data) or not hasattr(data, "__iter__"):
        return
    first = data if hasattr(data, "__next__") else iter(data)
    if first is data or iter(data) is first:
        raise CalibrationError(
            f"The data, a {type(data).__name__}, are an iterator that can be read once, and the"
            " trials would use it up.",
            "Give data that begin again at each iter(), such as a class with a generator __iter__.",
        )
