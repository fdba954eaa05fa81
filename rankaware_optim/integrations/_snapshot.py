"""What a trial of a built model may change, put back as often as needed."""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ..calibration import Trial, held_back
from ..errors import CalibrationError

# Containers within containers that are put back: such as metrics by mode and name
_DEPTH = 3
# Entries of a container above which it is data, whose rows nobody replaces
_DATA = 10_000
# Entries of a buffer of whole numbers above which it is packed weights, which nothing trains
_PACKED = 65_536
_DATA_KINDS = (Dataset, Sampler, DataLoader)
_CONFIGS = ("config", "generation_config")
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
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        objects: Iterable[Any] = (),
        data: Iterable[Any] = (),
    ) -> None:
        modules = [*dict.fromkeys(m for model in models for m in model.modules())]
        configs = [vars(m).get(name) for m in modules for name in _CONFIGS]
        data = _with_parts(data)
        seen = {id(rows): _as_it_is(rows) for rows in data}
        owners = [(each, _DEPTH) for each in (*modules, *configs, *objects)]
        owners += [(each, 0) for each in data]
        self._attributes = [
            _kept(vars(owner), seen, depth)
            for owner, depth in owners
            if hasattr(owner, "__dict__")
        ]
        params = _once(m.parameters(recurse=False) for m in modules)
        buffers = _once(m.buffers(recurse=False) for m in modules)
        self._values: dict[torch.Tensor, torch.Tensor] = {}
        self._keep_values(b for b in buffers if not _is_packed(b))
        trained = [p for p in params if p.requires_grad]
        self._keep_values(trained)
        self._gradients = [(p, p.requires_grad, p.grad) for p in params]
        self._random = _random_states()
        self.size = sum(t.numel() * t.element_size() for t in trained)

    def begin(self, trial: Trial) -> None:
        """Put the state back for a trial, which begins without gradients. Before it makes its
        optimizer, the values of weights that were frozen and now train are copied too.
        """
        self._put_back()
        for param, _, _ in self._gradients:
            param.grad = None
        make = trial.optimizer

        def optimizer(params: Any, /, **settings: Any) -> Any:
            known = (param for param, _, _ in self._gradients)
            self._keep_values(p for p in known if p.requires_grad)
            return make(params, **settings)

        trial.optimizer = optimizer  # type: ignore[method-assign]

    def _keep_values(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
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
        with held_back(math.inf):
            self._put_back()
            _set_random_states(*self._random)

    @torch.no_grad()
    def _put_back(self) -> None:
        for put_back in self._attributes:
            put_back()
        for tensor, value in self._values.items():
            tensor.copy_(value)
        for param, requires_grad, grad in self._gradients:
            param.requires_grad_(requires_grad)
            param.grad = grad


def _once(groups: Iterable[Iterable[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the tensors of all groups, tied ones once."""
    return [*dict.fromkeys(tensor for group in groups for tensor in group)]


def _is_packed(buffer: torch.Tensor) -> bool:
    """Return whether a buffer has a quantized layer's weights."""
    return not buffer.is_floating_point() and buffer.numel() > _PACKED


def _with_parts(data: Iterable[Any]) -> list[Any]:
    """Return data sets and loaders, and what is an attribute of them: data sets, samplers and
    collators.
    """
    queue, known = [*data], {}
    while queue:
        each = queue.pop()
        if id(each) in known or not hasattr(each, "__dict__"):
            continue
        known[id(each)] = each
        for name, value in vars(each).items():
            parts = value if isinstance(value, (list, tuple)) else [value]
            queue += [p for p in parts if isinstance(p, _DATA_KINDS)]
            queue += [value] if name == "collate_fn" else []
    return [*known.values()]


# --- attributes -----------------------------------------------------------------------------------


def _as_it_is(value: Any) -> PutBack:
    return lambda: value


def _kept(value: Any, seen: dict[int, PutBack], depth: int) -> PutBack:
    """Return a function that gives a value the contents that it has now, and returns it.

    Args:
        value: a container, or anything.
        seen: the functions of containers so far, by id, since they may hold each other.
        depth: of containers within the value that are given theirs too.
    """
    if id(value) not in seen:
        seen[id(value)] = _as_it_is(value)
        seen[id(value)] = _kept_contents(value, seen, depth - 1)
    return seen[id(value)]


def _kept_contents(value: Any, seen: dict[int, PutBack], depth: int) -> PutBack:
    if depth < -1:
        return _kept_state(value)
    if _is_plain_dict(value):
        return _kept_dict(value, seen, depth)
    if type(value) in (list, deque) and len(value) <= _DATA:
        return _kept_list(value, seen, depth)
    if type(value) is set and len(value) <= _DATA:
        return _kept_set(value)
    return _kept_state(value)


def _is_plain_dict(value: Any) -> bool:
    """Return whether a dict is one that can be emptied and filled, and is no data."""
    if not isinstance(value, dict) or len(value) > _DATA:
        return False
    return type(value).update in (dict.update, OrderedDict.update)


def _kept_dict(value: dict[Any, Any], seen: dict[int, PutBack], depth: int) -> PutBack:
    entries = [(key, _kept(each, seen, depth)) for key, each in value.items()]

    def put_back() -> Any:
        contents = [(key, back()) for key, back in entries]
        value.clear()
        value.update(contents)
        return value

    return put_back


def _kept_list(value: Any, seen: dict[int, PutBack], depth: int) -> PutBack:
    entries = [_kept(each, seen, depth) for each in value]

    def put_back() -> Any:
        contents = [back() for back in entries]
        value.clear()
        value.extend(contents)
        return value

    return put_back


def _kept_set(value: set[Any]) -> PutBack:
    entries = set(value)

    def put_back() -> Any:
        value.clear()
        value.update(entries)
        return value

    return put_back


def _kept_state(value: Any) -> PutBack:
    """Return the function for a random generator or a number in a tensor, such as a loss scale, or
    one that returns the value.
    """
    if isinstance(value, torch.Generator):
        return _setter(value, value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return _setter(value, value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return _setter(value, value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return _setter(value, lambda state: setattr(bits, "state", state), bits.state)
    is_tensor = isinstance(value, torch.Tensor) and not value.requires_grad
    if is_tensor and value.numel() == 1 and not value.is_meta:
        return _setter(value, value.copy_, value.clone())
    return _as_it_is(value)


def _setter(value: Any, set_state: Callable[[Any], Any], state: Any) -> PutBack:
    def put_back() -> Any:
        set_state(state)
        return value

    return put_back


# --- the process's random generators --------------------------------------------------------------


def _random_states() -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), devices


def _set_random_states(cpu: Any, numpys: Any, pythons: Any, devices: Any) -> None:
    torch.set_rng_state(cpu)
    np.random.set_state(numpys)
    random.setstate(pythons)
    if devices:
        torch.cuda.set_rng_state_all(devices)


# --- what cannot be put back ----------------------------------------------------------------------


def refuse_sharded(models: Iterable[nn.Module]) -> None:
    """Raise a `CalibrationError` for a model whose parameters a trial replaces or takes away: one
    that FSDP or DeepSpeed shards, or AdaLoRA.
    """
    for module in (m for model in models for m in model.modules()):
        kinds = {kind.__name__ for kind in type(module).__mro__}
        params = [*module.parameters(recurse=False)]
        if any(hasattr(p, "ds_id") for p in params):
            raise cannot_be_put_back("DeepSpeed's ZeRO shards it")
        is_sharded = any(hasattr(p, "to_local") for p in params)
        if is_sharded or kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise cannot_be_put_back("FSDP shards it")
        if "AdaLoraLayer" in kinds:
            raise cannot_be_put_back("AdaLoRA prunes its ranks while it trains")


def cannot_be_put_back(why: str) -> CalibrationError:
    """Return the error for a model that a trial would change for good."""
    return CalibrationError(
        f"The model cannot be put back after a trial: {why}.",
        "Give calibrate a function of the trial that builds a model or a trainer for each, or take"
        " ra.suggest_lr's rate.",
    )
