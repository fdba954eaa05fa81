"""What the user's training loop gives: runs that push, and what is checked of a run; seeds and
memory.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import CalibrationError

# Out-of-memory messages of torch on the CPU (Linux, Windows), on MPS and in cuBLAS, which are plain
# RuntimeErrors.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
)


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
            if part.any():
                return True
            seen = seen or part.numel() > 0
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
