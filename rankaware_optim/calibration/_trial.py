"""One run of the user's training loop: its arguments, and checks of what it yields."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from optuna.exceptions import TrialPruned

from .._checks import is_number
from .._types import Method
from ..errors import CalibrationError
from ..fitting import TAIL, recent
from ..optimizer import RankAwareOptimizer

Build = Callable[["Trial", Any, dict[str, Any]], RankAwareOptimizer]
Train = Callable[["Trial"], "Generator[Any, None, Any] | Pushed"]

# Out-of-memory messages of torch on the CPU (Linux, Windows), on MPS and in cuBLAS, which are plain
# RuntimeErrors.
_SAID = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")


@dataclass(eq=False)
class Trial:
    """One run of the user's `train`, passed to it by `calibrate`.

    Args:
        rank: the LoRA rank to build, None for full finetuning.
        seed: the random seed of the run.
        number: the trial's number, from 0.
        lr: the base rate, per step, in the coordinates of `Recipe.lr`. None until `optimizer` was
            called.
    """

    rank: int | None
    seed: int
    _steps: int
    number: int
    _build: Build = field(repr=False)
    lr: float | None = None
    _steps_were_read: bool = field(default=False, repr=False)

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run, with its warm-up and decay."""
        self._steps_were_read = True
        return self._steps

    @property
    def method(self) -> Method:
        """ "full" if `rank` is None, else "lora"."""
        return "full" if self.rank is None else "lora"

    def optimizer(self, params: Any, /, **settings: Any) -> RankAwareOptimizer:
        """Build a RankAwareOptimizer at this trial's rate. Call it once per trial.

        Args:
            params: the model, or parameters or parameter groups together with `model=`.
            **settings: the optimizer's settings, which are recorded, and arguments of
                `RankAwareOptimizer` such as `rates` and `other_lr`.

        Raises:
            CalibrationError: it was called twice, or a setting is decided by the trial.
        """
        if self.lr is not None:
            raise CalibrationError(
                "trial.optimizer was called twice in one trial.", "Call it once, after the model."
            )
        given = [name for name in ("lr", "tuned_at", "law", "recipe", "method") if name in settings]
        if given:
            raise CalibrationError(
                f"trial.optimizer got {given[0]}=, which the trial sets.", "Leave it out."
            )
        return self._build(self, params, settings)


class Outcome(NamedTuple):
    """The outcome of a run.

    curve: its values. returned: the score that it returned, if any. stopped: "" (ran all steps),
    "diverged", "pruned" or "memory" (ran out of memory). endless: whether the loop continued past
    its steps, None if unknown.
    """

    curve: list[float]
    returned: float | None = None
    stopped: str = ""
    endless: bool | None = None

    @property
    def tail(self) -> float:
        """Return the mean of the last tenth of the values, at least 5 of them."""
        return recent(self.curve, max(TAIL, len(self.curve) // 10))

    @property
    def score(self) -> float:
        """Return the value to minimise."""
        return math.inf if self.stopped else self.tail if self.returned is None else self.returned


class Pushed(NamedTuple):
    """A run that cannot yield, such as a trainer with callbacks. `train` may return it in place of
    a generator.

    `run(report)` calls `report(value)` at every step and ends soon after it returns True. Its
    return value is the score.
    """

    run: Callable[[Callable[[Any], bool]], Any]


@dataclass
class _Values:
    """The values of a run so far, and why it must stop."""

    trial: Trial
    limits: Sequence[float]
    watch: Callable[[Trial, list[float]], bool]
    mean: Callable[[float], float]
    curve: list[float] = field(default_factory=list)
    stopped: str = ""

    def take(self, value: Any) -> bool:
        """Store `value`. Return whether the run ends: it diverged, was pruned, or has run its
        steps.
        """
        taken = len(self.curve)
        if self.stopped or taken == self.trial._steps:
            return True
        self.curve.append(self.mean(_as_float(value, taken)))
        if not taken and not math.isfinite(self.curve[0]):
            raise CalibrationError(
                f"The first value that train yielded is {self.curve[0]}, which does not depend on"
                " the rate.",
                "Fix the model or the data: the first loss must be finite.",
            )
        if self.trial.lr is None:
            raise CalibrationError(
                "train yielded without calling trial.optimizer.",
                "Take the optimizer from trial.optimizer(model).",
            )
        risen = taken >= TAIL and recent(self.curve) > max(self.curve[0], self.limits[taken])
        if risen or not math.isfinite(self.curve[-1]):
            self.stopped = "diverged"
        elif self.watch(self.trial, self.curve):
            self.stopped = "pruned"
        return bool(self.stopped) or taken + 1 == self.trial._steps

    def outcome(self, returned: Any = None, endless: bool | None = None) -> Outcome:
        """Return the outcome of a run that has ended. Raise a `CalibrationError` if it ended too
        early.
        """
        taken, steps = len(self.curve), self.trial._steps
        if self.stopped:
            return Outcome(self.curve, stopped=self.stopped)
        if not taken:
            raise CalibrationError("train yielded nothing.", "Yield the loss once per step.")
        if taken < steps:
            raise CalibrationError(
                f"train ended after {taken} of {steps} steps.",
                "Let it yield a value for each step, or lower steps=.",
            )
        score = None if returned is None else self.mean(_as_float(returned, taken, "return value"))
        return Outcome(self.curve, score, endless=endless)


def run_trial(
    train: Train,
    trial: Trial,
    *,
    limits: Sequence[float],
    endless: bool | None,
    watch: Callable[[Trial, list[float]], bool],
    mean: Callable[[float], float] = float,
) -> Outcome:
    """Take `trial.steps` values from `train(trial)`, then close it, so that its `finally` blocks
    run.

    A run that raises optuna.TrialPruned or runs out of memory is pruned.

    Args:
        train: the user's training loop.
        trial: the trial to run.
        limits: the mean of recent values above which the run counts as diverged, for each step.
        endless: whether the loop is known to continue past its steps. If None, it is resumed once
            more to get its return value.
        watch: called with every new value. It returns whether to prune the run.
        mean: averages a value over the processes that train together.
    """
    values = _Values(trial, limits, watch, mean)
    try:
        run = train(trial) if callable(train) else train
        if isinstance(run, Pushed):
            return values.outcome(run.run(values.take))
        return _pulled(run, values, endless)
    except TrialPruned:
        values.stopped = "pruned"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        values.stopped = "memory"
    if values.stopped == "memory":
        release_memory()
    return values.outcome()


def _pulled(run: Any, values: _Values, endless: bool | None) -> Outcome:
    if not isinstance(run, Generator):
        raise CalibrationError(
            f"train returned a {type(run).__name__} instead of a generator.",
            "Let it yield a value at every step.",
        )
    try:
        ended = any(values.take(value) for value in run)
        if values.stopped or endless or not ended:
            return values.outcome(endless=endless)
        try:
            next(run)
        except StopIteration as stop:
            return values.outcome(stop.value, endless=False)
        if endless is False:
            raise CalibrationError(
                f"train continued after {len(values.curve)} steps, but an earlier run ended there.",
                "Let every run end at trial.steps, or none.",
            )
        return values.outcome(endless=True)
    finally:
        run.close()


def _as_float(value: Any, step: int, what: str = "value") -> float:
    size = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", 0)
    found = (
        value.item()
        if isinstance(value, (torch.Tensor, np.generic, np.ndarray)) and size == 1
        else value
    )
    if not is_number(found):
        raise CalibrationError(
            f"train's {what} at step {step} is a {type(value).__name__}.",
            "Yield a number or a one-element tensor.",
        )
    try:
        return float(found)
    except OverflowError:  # a whole number beyond every float
        return math.inf if found > 0 else -math.inf


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, random and numpy for one run, and restore all three afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def release_memory() -> None:
    """Collect reference cycles and release the accelerator's cached memory.

    Call it after the error was dropped, since its traceback keeps the frames and their tensors
    alive.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
