"""What the user's training loop gets and gives: a trial, and what is checked of it."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from .._types import Method
from ..errors import CalibrationError
from ..optimizer import RankAwareOptimizer

Train = Callable[["Trial"], "Generator[Any, None, Any] | Pushed"]
# builds the optimizer of a trial from the parameters and the settings
Build = Callable[["Trial", Any, dict[str, Any]], RankAwareOptimizer]

# Out-of-memory messages of torch on the CPU (Linux, Windows), on MPS and in cuBLAS, which are plain
# RuntimeErrors.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
)


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
    _build: Build = field(repr=False)
    lr: float | None = None
    # gives an optimizer whose schedule is followed in place of the trial's, while it lives
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
                `RankAwareOptimizer` such as `rates` and `other_lr`, but those that set the rate.

        Raises:
            CalibrationError: it was called twice, or the model has another rank.
        """
        if self.lr is not None:
            raise CalibrationError(
                "trial.optimizer was called twice in one trial.",
                "Call it once, after the model.",
            )
        return self._build(self, params, settings)


class Pushed(NamedTuple):
    """A run that cannot yield, such as a trainer with callbacks. `train` may return it in place of
    a generator.

    `run(report)` calls `report(value)` at every step and ends soon after it returns True. Its
    return value is the score.
    """

    run: Callable[[Callable[[Any], bool]], Any]


# --- what a run is checked for --------------------------------------------------------------------


def as_float(value: Any) -> float:
    """Return a number or a tensor of one element as a float."""
    return float(value.item() if hasattr(value, "item") else value)


def refuse_warmup(warmup: float, steps: int) -> None:
    """Raise a `CalibrationError` if a warm-up is as long as a trial, both in steps."""
    if warmup >= steps:
        raise CalibrationError(
            f"The warm-up is as long as the trial: the rate still rises at its step {steps}, so"
            " the rate of the run is never tried.",
            "Give the warm-up as a share of the steps, or scale its steps by those of the trial.",
        )


def rising_steps(rates: Sequence[float]) -> int:
    """Return the number of steps over which the rate rose from the first one to its highest; 0 if
    it did not.

    >>> rising_steps([0.5, 1.0, 0.8]), rising_steps([1.0, 1.0]), rising_steps([1.0, 0.5, 1.1])
    (2, 0, 0)
    """
    peak = rates.index(max(rates)) if rates else 0
    rises = all(a <= b for a, b in pairwise(rates[: peak + 1]))
    return peak + 1 if peak and rises else 0


def refuse_micro_batches(stepped: Sequence[int], taken: int) -> None:
    """Raise a `CalibrationError` if every step had several values, as where each micro-batch yields
    one. A step that was skipped, as by a GradScaler, is none.

    stepped: the number of values before each step of the optimizer. taken: that of all values.
    """
    # a single step has the values after it
    ends = stepped if len(stepped) != 1 else [*stepped, taken]
    if min((b - a for a, b in pairwise(ends)), default=0) >= 2:
        raise CalibrationError(
            f"train yielded {taken} values while its optimizer took {len(stepped)} step"
            f"{'s' * (len(stepped) > 1)}.",
            "Yield one value a step, such as the mean loss of its micro-batches.",
        )


def has_moved(opt: Any) -> bool:
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


# --- seeds and memory -----------------------------------------------------------------------------


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
