"""What a trial in place needs of any trainer: a record of its run, data that it does not train on,
and the state to which everything is put back.

Importing this module imports no trainer.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from .. import calibration
from ..errors import CalibrationError

FILE = "recipe.toml"
"""The recipe in a run's folder."""
BATCHES = 16
"""Batches that score a trial, at most."""
_PART = 10  # one of so many rows of the training data is held out, at most
_SEED = 0  # of the rows that are chosen, the same for every trial

# How deep containers within an object's attributes are put back: such as metrics by mode and name
_OF_OBJECT, _OF_DATA = 3, 1
# Entries of a container above which it is data, whose rows nobody replaces
_ROWS = 10_000
# Entries of a buffer of whole numbers above which it is packed weights, which nothing trains
_PACKED = 65_536
_CONTAINERS = (dict, list, deque, set)
# What replaces parameters, or takes them away: flags of trainers, and names of classes
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
PutBack = Callable[[], Any]


@dataclass
class TrainerRuns:
    """The runs of trainers: what all have, and the trial that runs.

    Args:
        native: the optimizer's class.
        settings: the optimizer's.
        score: a function of the trainer, or None for the loss on data held out.
        built: whether the trainer was built before the calibration.
        batch: examples a step, once known.
        warmup: share of the steps with a rising rate, once known.
        by_reward: whether a step's value is minus a reward.
        like: an optimizer at whose rates a module's own one trains.
    """

    native: type[Optimizer]
    settings: Mapping[str, Any]
    score: Callable[[Any], Any] | None
    built: bool
    batch: float | None = None
    warmup: float | None = None
    by_reward: bool = False
    like: Any = None

    def begin(
        self, trial: calibration.Trial, runner: calibration.TrialRunner
    ) -> TrainerRuns:
        """Return this record, of a trial that begins. runner: takes the values of its steps."""
        self.trial, self.runner, self.steps_taken = trial, runner, 0
        return self

    def end_step(self, value: Any) -> bool:
        """Report the step's value. Return whether the run must end."""
        self.steps_taken += 1
        return self.runner.report(value)

    def result(self, trainer: Any, loss: Callable[[], Any]) -> Any:
        """Return the score of a run that took all its steps, or None if there is none. loss:
        returns that on data held out, or None.
        """
        if self.steps_taken < self.trial.steps:
            return None
        return loss() if self.score is None else self.score(trainer)


# --- data held out --------------------------------------------------------------------------------


def held_out(data: Any, rows: int) -> tuple[Any, Any] | None:
    """Return at most so many rows of training data and the rest of them, None if they are too
    few.
    """
    if is_sized(data):
        rows = min(rows, len(data) // _PART)
    return divided(data, rows) if rows else None


def divided(data: Any, rows: int) -> tuple[Any, Any]:
    """Return so many rows of a data set, and the rest of them: fixed ones chosen by chance, or the
    first ones of a stream.
    """
    if not is_sized(data):
        return _Stream(data, 0, rows), _Stream(data, rows, None)
    chosen = {*random.Random(_SEED).sample(range(len(data)), min(rows, len(data)))}
    others = [i for i in range(len(data)) if i not in chosen]
    # of datasets
    select = getattr(data, "select", None) or partial(Subset, data)
    return select(sorted(chosen)), select(others)


def is_sized(data: Any) -> bool:
    """Return whether a data set has numbered rows, and is no stream."""
    return hasattr(data, "__len__") and not isinstance(data, IterableDataset)


class _Stream(IterableDataset[Any]):
    """The rows of a stream from one number on to another."""

    def __init__(self, data: Any, start: int, stop: int | None) -> None:
        super().__init__()
        self.data, self.start, self.stop = data, start, stop

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), self.start, self.stop)


# --- what is put back -----------------------------------------------------------------------------


class Snapshot:
    """The state of models and of other objects, as it is now.

    Of a module and of an object it is every attribute, with what its containers hold: hooks, a
    replaced forward, flags, generators. Of a model it is also what trains: values, gradients, and
    what requires one. Only the values of weights that train and of buffers are copied.

    Args:
        models: the models.
        objects: what else a trial may change, such as a trainer, or what shards a model.
        data: data sets, loaders and collators, or lists of them. Their rows are not put back.

    Raises:
        CalibrationError: a model is sharded or its ranks are pruned, or data can be read once.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        objects: Iterable[Any] = (),
        data: Iterable[Any] = (),
    ) -> None:
        whole = nn.ModuleList(models)
        _, *modules = whole.modules()
        self._put_backs = [*_put_backs([*modules, *objects], data)]
        params = whole.parameters()
        self._gradients = [(p, p.requires_grad, p.grad) for p in params]
        self._values: dict[torch.Tensor, torch.Tensor] = {}
        self._keep_trained()
        self.size = sum(t.numel() * t.element_size() for t in self._values)
        for buffer in whole.buffers():
            if buffer.is_floating_point() or buffer.numel() <= _PACKED:
                self._keep(buffer)

    def begin(self) -> None:
        """Put the state back for a trial, which begins without gradients."""
        self._put_back()
        for param, _, _ in self._gradients:
            param.grad = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep_trained(self, *hooked: Any) -> None:
        for param, _, _ in self._gradients:
            if param.requires_grad:
                self._keep(param)

    def _keep(self, tensor: torch.Tensor) -> None:
        if tensor not in self._values:
            self._values[tensor] = tensor.detach().clone()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put everything back at the end of the context, however it ends. Ctrl-C waits for it.
        Before every step, the values of weights that were frozen and now train are copied too.
        """
        hook = register_optimizer_step_pre_hook(self._keep_trained)
        try:
            try:
                yield
            finally:
                hook.remove()
                self._end()
        except KeyboardInterrupt:
            self._end()  # Ctrl-C may have come just before signals were held back
            raise

    def _end(self) -> None:
        with calibration.held_back(math.inf):
            self._put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        for put_back in self._put_backs:
            put_back()
        for tensor, value in self._values.items():
            tensor.copy_(value)
        for param, requires_grad, grad in self._gradients:
            param.requires_grad_(requires_grad)
            param.grad = grad


def _put_backs(objects: Iterable[Any], data: Iterable[Any]) -> Iterator[PutBack]:
    """Yield what puts back the attributes of objects, and of data."""
    seen: set[int] = set()  # objects may hold each other
    for each in data:
        refuse_iterator(each)
        yield from _kept(_attributes(each), _OF_DATA, seen)
    for each in objects:
        refuse_sharded(each)
        yield from _kept(_attributes(each), _OF_OBJECT, seen)


def _kept(value: Any, depth: int, seen: set[int]) -> Iterator[PutBack]:
    """Yield what puts back a value: a container with the containers in it down to a depth, data
    sets and configurations in it with their attributes, or a state.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    if _has_state(value):
        refuse_iterator(value)
        yield from _kept(_attributes(value), _OF_DATA, seen)
    elif not isinstance(value, _CONTAINERS):
        yield from _kept_state(value)
    elif depth >= 0 and len(value) <= _ROWS:
        is_dict = isinstance(value, dict)
        contents: Any = dict(value) if is_dict else [*value]
        yield value.clear
        yield partial(
            value.update if hasattr(value, "update") else value.extend, contents
        )
        for each in contents.values() if is_dict else contents:
            yield from _kept(each, depth - 1, seen)


def _attributes(value: Any) -> Any:
    """Return the attributes of an object; of a container, itself."""
    return getattr(value, "__dict__", value)


def _has_state(value: Any) -> bool:
    """Return whether an object is a part of data, collators among them, or a configuration."""
    if isinstance(value, (nn.Module, type)):
        return False
    is_data = isinstance(value, (Dataset, Sampler, DataLoader))
    return is_data or callable(value) or hasattr(value, "to_dict")


def _kept_state(value: Any) -> Iterator[PutBack]:
    """Yield what puts back a random generator or a number in a tensor, such as a loss scale."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        yield partial(value.set_state, value.get_state())  # type: ignore[arg-type]
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        bits = value.bit_generator
        yield partial(setattr, bits, "state", bits.state)
    elif isinstance(value, torch.Tensor) and value.numel() == 1:
        yield partial(value.copy_, value.detach().clone())


# --- what cannot be put back ----------------------------------------------------------------------


def refuse_sharded(owner: Any) -> None:
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
            "Give calibrate a function of the trial that builds a model or a trainer for each, or"
            " take ra.suggest_lr's rate.",
        )


def refuse_iterator(data: Any) -> None:
    """Raise a `CalibrationError` for a stream that can be read once: a trial would use it up."""
    if is_sized(data) or not hasattr(type(data), "__iter__"):
        return
    if iter(data) is iter(data):
        raise CalibrationError(
            f"The data, a {type(data).__name__}, are an iterator that can be read once, and the"
            " trials would use it up.",
            "Give data that begin again at each iter(), such as a class with a generator __iter__.",
        )
