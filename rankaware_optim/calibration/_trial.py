"""One run of the user's training loop: its arguments, and checks of what it yields."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
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
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
)
# steps that a warm-up from zero, or a value yielded before its step, may leave without effect
_FEW = 2
_SET_BY_TRIAL = ("lr", "tuned_at", "law", "recipe", "method")


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
    # the mean of recent values above which the run counts as diverged, for each step
    _limits: list[float] = field(repr=False)
    # whether the loop continues past its steps; None if unknown
    _endless: bool | None = field(repr=False)
    # the trials done, and the best base rate so far, None before any fit
    _progress: tuple[int, float | None] = field(repr=False)
    lr: float | None = None
    _build: Build | None = field(default=None, repr=False)
    # gives the optimizer while it lives
    _optimizer: Callable[[], Any] | None = field(default=None, repr=False)

    @cached_property  # so that its reading can be seen
    def steps(self) -> int:
        """The number of optimizer steps of the whole run, with its warm-up and decay."""
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
                "trial.optimizer was called twice in one trial.",
                "Call it once, after the model.",
            )
        for name in _SET_BY_TRIAL:
            if name in settings:
                raise CalibrationError(
                    f"trial.optimizer got {name}=, which the trial sets.",
                    "Leave it out.",
                )
        assert self._build is not None
        optimizer = self._build(self, params, settings)
        self._optimizer = weakref.ref(optimizer)
        return optimizer


class Pushed(NamedTuple):
    """A run that cannot yield, such as a trainer with callbacks. `train` may return it in place of
    a generator.

    `run(report)` calls `report(value)` at every step and ends soon after it returns True. Its
    return value is the score.
    """

    run: Callable[[Callable[[Any], bool]], Any]


@dataclass
class Run:
    """The values of one run of `train`, and how it ended.

    Args:
        trial: the trial.
        watch: called with the values after each. It returns whether to prune the run.
        mean: averages a value over the processes that train together.
        curve: the values.
        stopped: "" (ran all steps), "diverged", "pruned" or "memory" (ran out of memory).
        returned: the score that the loop returned, if any.
    """

    trial: Trial
    watch: Callable[[list[float]], bool]
    mean: Callable[[float], float]
    curve: list[float] = field(default_factory=list)
    stopped: str = ""
    returned: float | None = None

    def take(self, value: Any) -> bool:
        """Store `value`. Return whether the run ends: it diverged, was pruned, or has run its
        steps.
        """
        taken = len(self.curve)
        steps = self.trial._steps
        if self.stopped or taken == steps:
            return True
        self.curve.append(self.mean(_as_float(value, taken)))
        if taken == 0:
            self._check_first(self.curve[0])
        if self._has_diverged():
            self.stopped = "diverged"
        elif self.watch(self.curve):
            self.stopped = "pruned"
        elif _FEW < len(self.curve) == steps:
            self._check_trained()
        return bool(self.stopped) or len(self.curve) == steps

    def _check_first(self, value: float) -> None:
        if not math.isfinite(value):
            raise CalibrationError(
                f"The first value that train yielded is {value}, which does not depend on the"
                " rate.",
                "Fix the model or the data: the first loss must be finite.",
            )
        if self.trial.lr is None:
            raise CalibrationError(
                "train yielded without calling trial.optimizer.",
                "Take the optimizer from trial.optimizer(model).",
            )

    def _has_diverged(self) -> bool:
        if not math.isfinite(self.curve[-1]):
            return True
        limit = max(self.curve[0], self.trial._limits[len(self.curve) - 1])
        return len(self.curve) > TAIL and recent(self.curve, TAIL) > limit

    def _check_trained(self) -> None:
        """Raise if every factor that was zero at the start is still zero, since any gradient and
        rate would have moved some.
        """
        alive = self.trial._optimizer
        if self.mean(float(_has_moved(alive and alive()))) == 0.0:
            raise CalibrationError(
                f"Nothing was trained: after {len(self.curve)} steps at the rate"
                f" {self.trial.lr:.3g} every LoRA factor that was zero at the start is still zero.",
                "Call loss.backward(), then the step of the optimizer of trial.optimizer, then"
                " zero_grad(), and see that the schedule lets the rate rise above zero.",
            )

    def end(self, returned: Any = None) -> None:
        """Take the score of a run that has ended by itself. Raise a `CalibrationError` if that was
        too early.
        """
        taken = len(self.curve)
        steps = self.trial._steps
        if self.stopped:
            return
        if not taken:
            raise CalibrationError(
                "train yielded nothing.", "Yield the loss once per step."
            )
        if taken < steps:
            raise CalibrationError(
                f"train ended after {taken} of {steps} steps.",
                "Let it yield a value for each step, or lower steps=.",
            )
        if returned is not None:
            self.returned = self.mean(_as_float(returned, taken, "return value"))

    @property
    def tail(self) -> float:
        """Return the mean of the last tenth of the values, at least 5 of them."""
        return recent(self.curve)

    @property
    def score(self) -> float:
        """Return the value to minimise."""
        if self.stopped:
            return math.inf
        return self.tail if self.returned is None else self.returned


def _has_moved(opt: Any) -> bool:
    """Return whether some factor that was zero at the start is not zero, or none can be seen."""
    zero: list[torch.Tensor] = []
    for group in [] if opt is None else opt.param_groups:
        if {group.get("lora_role"), group.get("lora_init")} == {"A", "B"}:
            zero += group["params"]
    # of a sharded one, this process's part
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in zero]
    # float16 has no rates below 6e-8
    judged = [p for p in parts if p.numel() and p.dtype != torch.float16]
    return not judged or any(bool(p.any()) for p in judged)


def run_trial(
    train: Train,
    trial: Trial,
    watch: Callable[[list[float]], bool],
    mean: Callable[[float], float],
) -> Run:
    """Take `trial.steps` values from `train(trial)`, then close it, so that its `finally` blocks
    run.

    A run that raises optuna.TrialPruned or runs out of memory is pruned. The arguments are those of
    `Run`.
    """
    run = Run(trial, watch, mean)
    try:
        loop = train(trial) if callable(train) else train
        if isinstance(loop, Pushed):
            run.end(loop.run(run.take))
        else:
            _pull(loop, run)
    except TrialPruned:
        run.stopped = "pruned"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        run.stopped = "memory"
    if run.stopped == "memory":
        release_memory()
    return run


def _pull(loop: Any, run: Run) -> None:
    """Take the values of a generator. Unless the loop is known to be endless, resume it once more
    to get its return value.
    """
    if not isinstance(loop, Generator):
        raise CalibrationError(
            f"train returned a {type(loop).__name__} instead of a generator.",
            "Let it yield a value at every step.",
        )
    trial = run.trial
    try:
        ended = any(run.take(value) for value in loop)
        if run.stopped or trial._endless or not ended:
            return run.end()
        try:
            next(loop)
        except StopIteration as stop:
            trial._endless = False
            return run.end(stop.value)
        if trial._endless is False:
            raise CalibrationError(
                f"train continued after {len(run.curve)} steps, but an earlier run ended there.",
                "Let every run end at trial.steps, or none.",
            )
        trial._endless = True
    finally:
        loop.close()


def _as_float(value: Any, step: int, what: str = "value") -> float:
    number = value
    if (
        isinstance(value, (torch.Tensor, np.generic, np.ndarray))
        and math.prod(value.shape) == 1
    ):
        number = value.item()
    if not is_number(number):
        raise CalibrationError(
            f"train's {what} at step {step} is a {type(value).__name__}.",
            "Yield a number or a one-element tensor.",
        )
    try:
        return float(number)
    except OverflowError:  # a whole number beyond every float
        return math.inf if number > 0 else -math.inf


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, random and numpy for one run, and restore all three afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
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

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in _OUT_OF_MEMORY
    )


def release_memory() -> None:
    """Collect reference cycles and release the accelerator's cached memory.

    Call it after the error was dropped, since its traceback keeps the frames and their tensors
    alive.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
