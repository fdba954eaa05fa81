"""One run of the user's training loop: its arguments, and checks of what it yields."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from optuna.exceptions import TrialPruned

from .._checks import is_number
from .._types import Method
from ..errors import CalibrationError
from ..fitting import TAIL, recent
from ..optimizer import RankAwareOptimizer
from ._constants import FEW

Train = Callable[["Trial"], "Generator[Any, None, Any] | Pushed"]

# Out-of-memory messages of torch on the CPU (Linux, Windows), on MPS and in cuBLAS, which are plain
# RuntimeErrors.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
)
_SET_BY_TRIAL = ("lr", "tuned_at", "law", "recipe", "method")


class Host(Protocol):
    """Who runs a trial.

    noisy: see `Options`.
    """

    noisy: bool

    def build(
        self, trial: Trial, params: Any, settings: dict[str, Any]
    ) -> RankAwareOptimizer:
        """Build the trial's optimizer, and set its rate."""

    def mean(self, value: float) -> float:
        """Return the mean of a value over the processes that train together."""

    def is_pruned(self, trial: Trial) -> bool:
        """Take the values of a run so far. Return whether it is to be pruned."""


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
    number: int
    _steps: int
    # the mean of recent values above which the run counts as diverged, for each step
    _limits: list[float] = field(repr=False)
    _host: Host = field(repr=False)
    lr: float | None = None
    _curve: list[float] = field(default_factory=list, repr=False)
    # "diverged", "pruned", "memory" (ran out of memory), or "" for a run of all steps
    _stopped: str = ""
    _returned: float | None = None  # the score that the loop returned
    _rates: list[float] = field(default_factory=list, repr=False)  # after each step
    _warmup: float = 0.0  # the share of the steps over which the rate rose
    # give the optimizer, and another one at its rates whose schedule is followed, while they live
    _optimizer: Callable[[], Any] | None = field(default=None, repr=False)
    _optimizer_steps: int = field(default=0, repr=False)
    _at_step: int = field(default=0, repr=False)  # values yielded before its last one
    # of values between two of them
    _fewest: float = field(default=math.inf, repr=False)
    _scheduled: Callable[[], Any] | None = field(default=None, repr=False)

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
            params: the model, or a list of several, as [unet, text_encoder], or parameters or
                parameter groups together with `model=`.
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
        optimizer = self._host.build(self, params, settings)
        self._optimizer = weakref.ref(optimizer)
        optimizer.register_step_post_hook(self._note_step)
        # schedule-free optimizers warm up by themselves
        steps = optimizer.defaults.get("warmup_steps", 0)
        refuse_warmup(steps, self._steps)
        self._warmup = steps / self._steps
        return optimizer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_step(self, *hooked: Any) -> None:
        """Note a step of the optimizer, and how many values came since the last one."""
        taken = len(self._curve)
        if self._optimizer_steps:
            self._fewest = min(self._fewest, taken - self._at_step)
        self._at_step = taken
        self._optimizer_steps += 1

    def _report(self, value: Any) -> bool:
        """Take the value of a step. Return whether the run ends: it diverged, is pruned, or has run
        its steps.
        """
        taken = len(self._curve)
        if self._stopped or taken == self._steps:
            return True
        self._curve.append(self._host.mean(_as_float(value, taken)))
        alive = self._scheduled or self._optimizer
        self._rates.extend(_rate_of(alive and alive()))
        if taken == 0:
            self._check_first(self._curve[0])
        if self._has_diverged():
            self._stopped = "diverged"
        elif self._host.is_pruned(self):
            self._stopped = "pruned"
        elif FEW < len(self._curve) == self._steps:
            self._check_steps()
            if not self._host.noisy:  # equal rewards give no gradient
                self._check_trained()
            self._check_warmup()
        elif self._optimizer_steps == FEW + 1:
            self._check_steps()
        return bool(self._stopped) or len(self._curve) == self._steps

    def _check_first(self, value: float) -> None:
        if not math.isfinite(value):
            raise CalibrationError(
                f"The first value that train yielded is {value}, which does not depend on the"
                " rate.",
                "Fix the model or the data: the first loss must be finite.",
            )
        if self.lr is None:
            raise CalibrationError(
                "train yielded without calling trial.optimizer.",
                "Take the optimizer from trial.optimizer(model).",
            )

    def _has_diverged(self) -> bool:
        if not math.isfinite(self._curve[-1]):
            return True
        limit = max(self._curve[0], self._limits[len(self._curve) - 1])
        return len(self._curve) > TAIL and recent(self._curve, TAIL) > limit

    def _check_steps(self) -> None:
        """Raise if every step had several values, as where each micro-batch yields one. A skipped
        step, as of a GradScaler, is none.
        """
        taken, steps = len(self._curve), self._optimizer_steps
        fewest = self._fewest if steps > 1 else taken - self._at_step
        if steps and 2 * steps <= taken and fewest >= 2:
            raise CalibrationError(
                f"train yielded {taken} values while its optimizer took {steps} step"
                f"{'s' * (steps > 1)}.",
                "Yield one value a step, such as the mean loss of its micro-batches.",
            )

    def _check_trained(self) -> None:
        """Raise if every factor that was zero at the start is still zero, since any gradient and
        rate would have moved some.
        """
        alive = self._optimizer
        if self._host.mean(float(_has_moved(alive and alive()))) == 0.0:
            raise CalibrationError(
                f"Nothing was trained: after {len(self._curve)} steps at the rate"
                f" {self.lr:.3g} every LoRA factor that was zero at the start is still zero.",
                "Call loss.backward(), then the step of the optimizer of trial.optimizer, then"
                " zero_grad(), and see that the schedule lets the rate rise above zero.",
            )

    def _check_warmup(self) -> None:
        """Take the warm-up's share of the steps. Raise if it is all of them."""
        steps = max(_rising(self._rates), self._warmup * self._steps)
        refuse_warmup(steps, self._steps)
        self._warmup = steps / self._steps

    def _end(self, returned: Any) -> None:
        """Take the score of a run that has ended by itself. Raise a `CalibrationError` if that was
        too early.
        """
        taken = len(self._curve)
        if self._stopped:
            return
        if not taken:
            raise CalibrationError(
                "train yielded nothing.", "Yield the loss once per step."
            )
        if taken < self._steps:
            raise CalibrationError(
                f"train ended after {taken} of {self._steps} steps.",
                "Let it yield a value for each step, or lower steps=.",
            )
        if returned is not None:
            self._returned = self._host.mean(_as_float(returned, taken, "return value"))


def refuse_warmup(warmup: float, steps: int) -> None:
    """Raise a `CalibrationError` if a warm-up is as long as a trial, both in steps."""
    if warmup >= steps:
        raise CalibrationError(
            f"The warm-up is as long as the trial: the rate still rises at its step {steps}, so"
            " the rate of the run is never tried.",
            "Give the warm-up as a share of the steps, or scale its steps by those of the trial.",
        )


def _rate_of(opt: Any) -> list[float]:
    """Return the rate of an optimizer's first group, [] if there is none."""
    groups = [] if opt is None else opt.param_groups
    return [float(group["lr"]) for group in groups[:1]]


def _rising(rates: list[float]) -> int:
    """Return the number of steps over which the rate rose from the first one to its highest; 0 if
    it did not.

    >>> _rising([0.5, 1.0, 0.8]), _rising([1.0, 1.0]), _rising([1.0, 0.5, 1.1])
    (2, 0, 0)
    """
    peak = rates.index(max(rates)) if rates else 0
    rises = all(a <= b for a, b in pairwise(rates[: peak + 1]))
    return peak + 1 if peak and rises else 0


class Pushed(NamedTuple):
    """A run that cannot yield, such as a trainer with callbacks. `train` may return it in place of
    a generator.

    `run(report)` calls `report(value)` at every step and ends soon after it returns True. Its
    return value is the score.
    """

    run: Callable[[Callable[[Any], bool]], Any]


def run_trial(train: Train, trial: Trial) -> None:
    """Run `train(trial)`, which reports its values to the trial.

    A run that raises optuna.TrialPruned or runs out of memory is pruned.
    """
    try:
        loop = train(trial) if callable(train) else train
        if isinstance(loop, Pushed):
            trial._end(loop.run(trial._report))
        else:
            trial._end(_pull(loop, trial))
    except TrialPruned:
        trial._stopped = "pruned"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        trial._stopped = "memory"
    if trial._stopped == "memory":
        release_memory()


def _pull(loop: Any, trial: Trial) -> Any:
    """Report the values of a generator, and return what it returns after its steps. It is closed,
    so that its `finally` blocks run.
    """
    if not isinstance(loop, Generator):
        raise CalibrationError(
            f"train returned a {type(loop).__name__} instead of a generator.",
            "Let it yield a value at every step.",
        )
    with closing(loop):
        for value in islice(loop, trial._steps):
            if trial._report(value):
                break
        if not trial._stopped:
            try:
                next(loop)
            except StopIteration as stop:
                return stop.value
    return None


def _has_moved(opt: Any) -> bool:
    """Return whether some factor that was zero at the start is not zero, or none can be seen."""
    seen = False
    for group in [] if opt is None else opt.rates.groups:
        if {group.role, group.init} != {"A", "B"}:
            continue
        for factor in group.params:
            # of a sharded one, this process's part
            part = factor.to_local() if hasattr(factor, "to_local") else factor
            # float16 has no rates below 6e-8
            if not part.numel() or part.dtype == torch.float16:
                continue
            if part.any():
                return True
            seen = True
    return not seen


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
