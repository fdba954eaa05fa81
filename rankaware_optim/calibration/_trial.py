"""One run of the user's training loop: what it is told, and what it yields, checked."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .._types import Method
from ..errors import CalibrationError
from ..optimizer import RankAwareOptimizer
from ._memory import is_out_of_memory, release_memory

__all__ = ["Outcome", "Pushed", "Train", "Trial", "run_trial"]

Build = Callable[["Trial", Any, dict[str, Any]], RankAwareOptimizer]
Train = Callable[["Trial"], "Generator[Any, None, Any] | Pushed"]

TAIL = 5  # values at least in the mean that scores a run


class Trial:
    """One run of the user's `train`: which `rank` to build (None for full finetuning), which `seed`, how many `steps`.

    `number` counts from 0. After `optimizer` was called, `lr` is the rate that the reference configuration would
    have, in the same coordinates as `Recipe.lr`.
    """

    def __init__(self, rank: int | None, seed: int, steps: int, number: int, build: Build) -> None:
        self.rank = rank
        self.seed = seed
        self.steps = steps
        self.number = number
        self.lr: float | None = None
        self._build = build

    @property
    def method(self) -> Method:
        """ "full" where `rank` is None, else "lora"."""
        return "full" if self.rank is None else "lora"

    def optimizer(self, params: Any, /, **settings: Any) -> RankAwareOptimizer:
        """A RankAwareOptimizer at this trial's rate. Call it once; `settings` are the optimizer's own and are recorded.

        `params` is the model, or parameters or groups with `model=`. rates=, other_lr= and the like are passed on.
        """
        if self.lr is not None:
            raise CalibrationError("trial.optimizer was called twice in one trial.", "Call it once, after the model.")
        given = [name for name in ("lr", "tuned_at", "law", "recipe", "method") if name in settings]
        if given:
            raise CalibrationError(f"trial.optimizer got {given[0]}=, which the trial decides.", "Leave it out.")
        return self._build(self, params, settings)


class Outcome(NamedTuple):
    """What a run gave: its values, the score it returned if any, and how it ended.

    stopped: "" (ran its steps), "diverged", "pruned" or "memory" (it ran out). endless: whether the loop went on past
    its steps; None if not learned.
    """

    curve: list[float]
    returned: float | None = None
    stopped: str = ""
    endless: bool | None = None

    @property
    def tail(self) -> float:
        """Mean of the last tenth of the values, at least 5."""
        last = self.curve[-max(TAIL, len(self.curve) // 10) :]
        return sum(last) / len(last)

    @property
    def score(self) -> float:
        """The value to minimise."""
        return math.inf if self.stopped else self.tail if self.returned is None else self.returned


class Pushed(NamedTuple):
    """A run that cannot yield, such as a trainer with callbacks: what a `train` may give in place of a generator.

    `run(report)` calls `report(value)` every step and ends soon after the answer True; what it returns is the score.
    """

    run: Callable[[Callable[[Any], bool]], Any]


class _Curve:
    """The values of a run so far, and why it is to stop."""

    def __init__(
        self,
        trial: Trial,
        limits: Sequence[float],
        watch: Callable[[Trial, list[float]], bool],
        mean: Callable[[float], float],
    ) -> None:
        self.trial, self.limits, self.watch, self.mean = trial, limits, watch, mean
        self.values: list[float] = []
        self.stopped = ""

    def outcome(self, returned: Any, endless: bool | None = None) -> Outcome:
        """What a run gave that ran its steps."""
        score = None if returned is None else self.mean(_as_float(returned, len(self.values), "return value"))
        return Outcome(self.values, score, endless=endless)

    def take(self, value: Any) -> bool:
        """Keep `value`; whether the run ends with it: it diverged, was pruned, or has run its steps."""
        if self.stopped or len(self.values) == self.trial.steps:
            return True
        self.values.append(self.mean(_as_float(value, len(self.values))))
        _check_first(self.trial, self.values)
        if _lost(self.values, self.limits[len(self.values) - 1]):
            self.stopped = "diverged"
        elif self.watch(self.trial, self.values):
            self.stopped = "pruned"
        return bool(self.stopped) or len(self.values) == self.trial.steps


def run_trial(
    train: Train,
    trial: Trial,
    *,
    limits: Sequence[float],
    endless: bool | None,
    watch: Callable[[Trial, list[float]], bool],
    mean: Callable[[float], float] = float,
) -> Outcome:
    """Take `trial.steps` values from `train(trial)`, then close it, so that its `finally` runs.

    limits: how high the mean of recent values may rise at each step, where that is above the first, before the run
    counts as diverged. watch: called with every new value; True prunes the run. endless: whether the loop is known to
    go on past its steps; where it is not known, the loop is resumed once more to learn its return value. A run that
    raises optuna.TrialPruned or runs out of memory is pruned. mean: of a value over the processes that train.
    """
    curve = _Curve(trial, limits, watch, mean)
    try:
        run = train(trial) if callable(train) else train
        return _pushed(run, curve) if isinstance(run, Pushed) else _pulled(run, curve, endless)
    except Exception as error:
        curve.stopped = _pruning(error)
        if not curve.stopped:
            raise
    if curve.stopped == "memory":
        release_memory()
    return Outcome(curve.values, stopped=curve.stopped)


def _pruning(error: Exception) -> str:
    """How a run ends that raises `error`: "pruned", "memory", or "" where the error is the user's to see."""
    from optuna.exceptions import TrialPruned

    if isinstance(error, TrialPruned):
        return "pruned"
    return "memory" if is_out_of_memory(error) else ""


def _pulled(run: Any, curve: _Curve, endless: bool | None) -> Outcome:
    if not isinstance(run, Generator):
        raise CalibrationError(
            f"train gave a {type(run).__name__} where a generator belongs.", "Let it yield a value every step."
        )
    try:
        for value in run:
            if curve.take(value):
                ended = bool(curve.stopped)
                return Outcome(curve.values, stopped=curve.stopped) if ended else _finish(run, curve, endless)
        raise _ended_early(curve.values, curve.trial.steps)
    finally:
        run.close()


def _pushed(run: Pushed, curve: _Curve) -> Outcome:
    returned = run.run(curve.take)
    if curve.stopped:
        return Outcome(curve.values, stopped=curve.stopped)
    if len(curve.values) < curve.trial.steps:
        raise _ended_early(curve.values, curve.trial.steps)
    return curve.outcome(returned)


def _finish(run: Generator[Any, None, Any], curve: _Curve, endless: bool | None) -> Outcome:
    if endless:
        return curve.outcome(None, endless=True)
    try:
        next(run)
    except StopIteration as stop:
        return curve.outcome(stop.value, endless=False)
    if endless is False:
        raise CalibrationError(
            f"train went on after {len(curve.values)} steps, where an earlier run ended.",
            "Let every run end at trial.steps, or none.",
        )
    return curve.outcome(None, endless=True)


def _check_first(trial: Trial, curve: list[float]) -> None:
    if len(curve) > 1:
        return
    if not math.isfinite(curve[0]):
        raise CalibrationError(
            f"The first value that train yielded is {curve[0]}, before any rate could matter.",
            "Mend the model or the data: the first loss must be finite.",
        )
    if trial.lr is None:
        raise CalibrationError(
            "train yielded without calling trial.optimizer.", "Take the optimizer from trial.optimizer(model)."
        )


def _as_float(value: Any, step: int, what: str = "value") -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CalibrationError(
            f"train's {what} at step {step} is a {type(value).__name__}.", "Yield a number or a one-element tensor."
        )
    return float(value)


def _lost(curve: Sequence[float], limit: float) -> bool:
    """Whether a run is beyond rescue: a non-finite value, or recent values above `limit` and the first."""
    if not math.isfinite(curve[-1]):
        return True
    return len(curve) > TAIL and recent(curve) > max(curve[0], limit)


def recent(curve: Sequence[float]) -> float:
    """Mean of the last few values."""
    last = curve[-TAIL:]
    return sum(last) / len(last)


def _ended_early(curve: Sequence[float], steps: int) -> CalibrationError:
    if not curve:
        return CalibrationError("train yielded nothing.", "Yield the loss once a step.")
    return CalibrationError(
        f"train ended after {len(curve)} of {steps} steps.", "Let it yield a value for each step, or lower steps=."
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, random and numpy for one run, and put all three back as they were."""
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy_random:
            numpy_random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)
