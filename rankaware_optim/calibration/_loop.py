"""The user's training loop: runs that report by callback, checks of what a run did, random seeds,
and memory.
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
    """A run that cannot yield its values, such as a trainer with callbacks. `train` may return it
    in place of a generator.

    Args:
        run: called with the trial's runner. At every step it calls `runner.report(value)`, and ends
            soon after that returns True. It returns the score, or None.
    """

    run: Callable[[TrialRunner], object]


# --- what a run is checked for --------------------------------------------------------------------


def one_number(value: object, what: str) -> float:
    """Return a number, or a tensor of one element, as a float.

    Args:
        value: what the loop yielded or returned.
        what: the beginning of the error's sentence, such as "The score is".

    Raises:
        CalibrationError: it is something else.
    """
    # tensors of torch and arrays of numpy have a shape, which is () for a single number
    shape = getattr(value, "shape", ())
    if math.prod(shape) != 1:
        raise CalibrationError(
            f"{what} a {type(value).__name__} of shape {tuple(shape)} instead of one number.",
            "Take its mean: yield losses.mean().",
        )
    if isinstance(value, Mapping):
        names = ", ".join(map(repr, value))
        raise CalibrationError(
            f"{what} a {type(value).__name__} with the keys {names} instead of one number.",
            "Yield the loss alone, such as out['loss'] or out.loss.",
        )
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        raise CalibrationError(
            f"{what} {shown(value)} instead of a number.",
            "Yield the loss of the step, as a float or a tensor of one element.",
        )
    return float(value)


def refuse_mixed_scores(run: Observation, others: Iterable[Observation]) -> None:
    """Raise a `CalibrationError` if only some trials return a score.

    A returned score and a mean of yielded values cannot be compared. A run that diverged returns
    nothing, whether the others do or not.
    """
    for other in others:
        is_mixed = other.returned != run.returned
        if is_mixed and math.isfinite(run.value + other.value):
            raise CalibrationError(
                "train returned a score in some trials, but not in others.",
                "Return a score in every trial, or in none.",
            )


def refuse_other_peaks(run: Run, others: Iterable[Run]) -> None:
    """Raise a `CalibrationError` if a trial did not train at the learning rate that it tries.

    A schedule multiplies the trial's learning rate by the same numbers in every trial. So the
    highest learning rates that two trials used have the ratio of the rates that they try. If not,
    something else sets the learning rate, and the search would compare nothing.

    Args:
        run: the trial that has ended.
        others: trials that have ended before.
    """
    for other in others:
        # a run that ended early has no highest learning rate: its warm-up may not have ended
        if not run.peak_share or not other.peak_share:
            continue
        if abs(math.log(run.peak_share / other.peak_share)) <= math.log(SAME_PEAK):
            continue
        raise CalibrationError(
            f"Trials {other.number} and {run.number} were to try the learning rates"
            f" {other.lr:.3g} and {run.lr:.3g}, but the highest ones that their optimizers used are"
            f" {other.peak_lr:.3g} and {run.peak_lr:.3g}. Something in train sets the learning rate"
            " itself.",
            "Take it from trial.lr, for example OneCycleLR(opt, max_lr=trial.lr, ...), and build"
            " optimizer, groups and schedule again in every trial.",
        )


def refuse_warmup(warmup: float, steps: int) -> None:
    """Raise a `CalibrationError` if a warm-up is as long as a trial, both in steps."""
    if warmup >= steps:
        raise CalibrationError(
            f"The warm-up is as long as the trial: at its last step, {steps}, the learning rate"
            " still rises, so the trial never trains at its learning rate.",
            "Let the warm-up be a share of trial.steps, for example trial.steps // 10.",
        )


def rising_steps(rates: Sequence[float]) -> int:
    """Return over how many steps the learning rate rose from its first value to its highest, or 0
    if it did not rise.

    >>> rising_steps([0.5, 1.0, 0.8]), rising_steps([1.0, 1.0]), rising_steps([1.0, 0.5, 1.1])
    (2, 0, 0)
    """
    if not rates:
        return 0
    peak = rates.index(max(rates))
    rises = all(a <= b for a, b in pairwise(rates[: peak + 1]))
    return peak + 1 if peak and rises else 0


def refuse_micro_batches(stepped: Sequence[int], taken: int) -> None:
    """Raise a `CalibrationError` if the loop yields several values a step, such as one for each
    micro-batch.

    A step that a GradScaler skipped has a value but is no step of the optimizer, so a single gap
    proves nothing: all of them must be too long.

    Args:
        stepped: for each step of the optimizer, how many values were yielded before it.
        taken: how many values were yielded in all.
    """
    # a single step has the values after it
    ends = stepped if len(stepped) != 1 else [*stepped, taken]
    if min((b - a for a, b in pairwise(ends)), default=0) >= 2:
        raise CalibrationError(
            f"train yielded {taken} values while its optimizer took {len(stepped)} step"
            f"{'s' * (len(stepped) > 1)}.",
            "Yield one value for each step, such as the mean loss of its micro-batches.",
        )


def has_moved(opt: RankAwareOptimizer | None) -> bool:
    """Return whether a LoRA matrix that was zero at the start has changed, or none was zero."""
    seen = False
    for group in [] if opt is None else opt.rates.groups:
        if {group.role, group.init} != {"A", "B"}:
            continue
        for factor in group.params:
            # a sharded matrix: the part that this process holds
            part = factor.to_local() if hasattr(factor, "to_local") else factor
            if part.any():
                return True
            seen = seen or part.numel() > 0
    return not seen


# --- seeds and memory -----------------------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, random and numpy for one run, and restore their states afterwards."""
    # torch has a context manager of its own for this, and random and numpy have none
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

    Call it after the `except` block of an error: the error's traceback keeps the frames of the run,
    and with them its tensors, alive.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
