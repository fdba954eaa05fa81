"""This module contains helper functions for running the user's training loop.

The functions check how a training run went, seed the random generators and release
memory.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .._checks import shown
from ..errors import CalibrationError
from ..fitting import Observation
from ..optimizer import RankAwareOptimizer
from ._constants import SAME_PEAK
from ._trials import Run

if TYPE_CHECKING:
    from ._runner import TrialRunner

# Out-of-memory messages of torch on the CPU (Linux, Windows), on MPS and in cuBLAS, which are plain
# RuntimeErrors.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
)


class CallbackRun(NamedTuple):
    """A training run that reports the value of each step by a callback instead of
    yielding the value.

    For example, a trainer that runs its own training loop cannot yield the loss of each
    step. The `train` function may return a `CallbackRun` instead of a generator.

    Args:
        run: a function that is called with the trial's runner. At every step it must call
            `runner.report(value)`, and it must stop soon after that call returns True. It
            returns the score, or None.
    """

    run: Callable[[TrialRunner], object]


# --- what a run is checked for --------------------------------------------------------------------


def one_number(value: object, result_of_train: str) -> float:
    """Convert a number, or a tensor with a single element, to a float.

    Args:
        value: the value that the loop yielded or returned.
        result_of_train: a description of the value for the error message, such as "score
            that train() returned".

    Raises:
        CalibrationError: the value is not a single number.
    """
    # tensors of torch and arrays of numpy have a shape, which is () for a single number
    shape = tuple(getattr(value, "shape", ()))
    kind = type(value).__name__
    if math.prod(shape) != 1:
        raise CalibrationError(
            f"The {result_of_train} must be a single number, but it is a {kind} of shape {shape}.",
            "Use the mean of the values, for example losses.mean().",
        )
    if isinstance(value, Mapping):
        keys = ", ".join(map(repr, value))
        raise CalibrationError(
            f"The {result_of_train} must be a single number, but it is a {kind} with the keys"
            f" {keys}.",
            "Use only the loss, for example out['loss'] or out.loss.",
        )
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        raise CalibrationError(
            f"The {result_of_train} must be a single number, but it is {shown(value)}.",
            "Use the loss of the step as a float, or as a tensor with one element.",
        )
    return float(value)


def refuse_mixed_scores(run: Observation, others: Iterable[Observation]) -> None:
    """Raise a `CalibrationError` if `train` returns a score in some trials but not in
    others.

    A score that the user's `train` function returns cannot be compared with the mean of
    the losses that it yields. Training runs that diverged are ignored, because `train`
    never returns a score for them.
    """
    for other in others:
        is_mixed = other.returned != run.returned
        # the sum is finite only if both values are
        if is_mixed and math.isfinite(run.value + other.value):
            raise CalibrationError(
                "train() returned a score in some trials but not in others, so the trials cannot be"
                " compared.",
                "Return a score in every trial, or in no trial.",
            )


def refuse_other_peaks(run: Run, others: Iterable[Run]) -> None:
    """Raise a `CalibrationError` if a trial did not train at the learning rate that the
    calibration chose for it.

    A schedule multiplies the trial's learning rate by the same factors in every trial.
    If the calibration chose twice the learning rate for a trial, the trial's highest
    learning rate must therefore also be twice as high. If the highest learning rates of
    two trials differ by another factor than the chosen ones, the user's code sets the
    learning rate itself. Such trials cannot be compared.

    Args:
        run: the trial that has just ended.
        others: the trials that ended before it.
    """
    for other in others:
        # Skip runs that ended early: they may have ended during the warm-up, before the
        # schedule reached its highest learning rate.
        if not run.peak_share or not other.peak_share:
            continue
        if abs(math.log(run.peak_share / other.peak_share)) <= math.log(SAME_PEAK):
            continue
        raise CalibrationError(
            "train() seems to set the learning rate itself, although calibrate() chooses it."
            f" Trial {other.number} was given the learning rate {other.lr:.3g} and trained at up"
            f" to {other.peak_lr:.3g}. Trial {run.number} was given {run.lr:.3g} and trained at up"
            f" to {run.peak_lr:.3g}.",
            "Take the learning rate from trial.lr, for example OneCycleLR(opt, max_lr=trial.lr,"
            " ...). Build the optimizer and the schedule again in every trial.",
        )


def refuse_warmup(warmup: float, steps: int) -> None:
    """Raise a `CalibrationError` if the warm-up of the learning rate is at least as
    long as the trial.
    """
    if warmup >= steps:
        raise CalibrationError(
            "The warm-up is as long as the trial, so the learning rate still increases at the last"
            f" of its {steps} steps.",
            "Shorten the warm-up, for example to trial.steps // 10 steps.",
        )


def rising_steps(rates: Sequence[float]) -> int:
    """Return the number of steps until the learning rate reached its highest value.

    Return 0 if the learning rate never increased, or if it decreased before it reached
    its highest value.

    >>> rising_steps([0.5, 1.0, 0.8]), rising_steps([1.0, 1.0]), rising_steps([1.0, 0.5, 1.1])
    (2, 0, 0)
    """
    if not rates:
        return 0
    peak = rates.index(max(rates))
    rises = all(a <= b for a, b in pairwise(rates[: peak + 1]))
    return peak + 1 if peak and rises else 0


def refuse_micro_batches(stepped: Sequence[int], taken: int) -> None:
    """Raise a `CalibrationError` if the user's training loop yields several values per
    optimizer step.

    The usual mistake is a training loop that yields a loss for each micro-batch. A
    GradScaler may occasionally skip an optimizer step. The error is therefore only
    raised if the training loop yields at least two values between every two consecutive
    optimizer steps.

    Args:
        stepped: for each optimizer step, the number of values that were yielded before it.
        taken: the total number of values that were yielded.
    """
    # With a single step there is no gap between steps: use the values that followed it.
    ends = stepped if len(stepped) != 1 else [*stepped, taken]
    if min((b - a for a, b in pairwise(ends)), default=0) >= 2:
        raise CalibrationError(
            "train() yielded more than one value per optimizer step. The number of values was"
            f" {taken}, and the number of optimizer steps was {len(stepped)}.",
            "Yield a single value for each optimizer step, for example the mean loss of its"
            " micro-batches.",
        )


def has_moved(opt: RankAwareOptimizer | None) -> bool:
    """Return whether training has changed a LoRA matrix that was zero at the start.

    If no LoRA matrix was zero at the start of training, this check is impossible and
    the result is True.
    """
    seen = False
    for group in [] if opt is None else opt.rates.groups:
        # Only the matrix that starts at zero: B if the init is "A", and A if it is "B".
        if {group.role, group.init} != {"A", "B"}:
            continue
        for factor in group.params:
            # A sharded matrix (FSDP): check only the part in this process, which may be empty.
            part = factor.to_local() if hasattr(factor, "to_local") else factor
            if part.any():
                return True
            seen = seen or part.numel() > 0
    return not seen


# --- seeds and memory -----------------------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random generators of torch, random and numpy for one training run, and
    restore their states afterwards.
    """
    # torch has a context manager that restores its random state, but random and numpy do not
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
    """Return whether an error means that the accelerator or the machine ran out of
    memory.

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

    After an out-of-memory error, call this function outside the `except` block. Inside
    the `except` block, the traceback of the error still refers to the tensors of the
    training run, so their memory could not be freed.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
