"""The role of a trainer: what this package asks of a trainer of any other library.

Importing this module imports no such library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from .._types import Task
from ..optimizer import RankAwareOptimizer, Report

# An object of another library. It may not be installed, so no type can name its classes.
External: TypeAlias = Any
# Arguments of an optimizer, and of `RankAwareOptimizer`
Settings: TypeAlias = dict[str, Any]

BATCHES = 16
"""A trial is scored on at most this many batches of held-out data."""


class AnyTrial(Protocol):
    """The part of `rankaware_optim.Trial` that a trainer uses."""

    seed: int

    @property
    def steps(self) -> int: ...

    @property
    def lr(self) -> float | None: ...

    def optimizer(
        self, params: External, /, **settings: object
    ) -> RankAwareOptimizer: ...


class Runner(Protocol):
    """What takes the values of a trial: see `calibration.TrialRunner`."""

    def report(self, value: object) -> bool: ...

    def follow(self, opt: Optimizer) -> None: ...


@dataclass
class TrialRun:
    """One trial while a trainer runs it.

    Args:
        trial: the trial.
        runner: takes the value of each step, and says whether the run must end.
        native: the optimizer class of the calibration.
        settings: the settings of the optimizer.
        score: the user's function of the trained trainer, None for the loss on held-out data.
        existing: whether the trainer existed before the calibration. A trainer that the user's
            function returns has its optimizer from the trial; an existing one is given the trial's
            learning rate.
    """

    trial: AnyTrial
    runner: Runner
    native: type[Optimizer]
    settings: Settings
    score: Callable[[External], object] | None
    existing: bool
    steps_taken: int = field(default=0, init=False)
    _stand_in: object = field(default=None, init=False)

    def end_step(self, value: object) -> bool:
        """Report the value of a step. Return whether the run must end."""
        self.steps_taken += 1
        return self.runner.report(value)

    def follow(self, opt: Optimizer, stand_in: RankAwareOptimizer) -> None:
        """Record the learning rates of an optimizer that the trainer has built by itself.

        Args:
            opt: the optimizer.
            stand_in: the trial's optimizer for the same model, which does not train. The trial
                refers to it weakly, so it is kept here.
        """
        self._stand_in = stand_in
        self.runner.follow(opt)

    def result(self, trainer: External, loss: Callable[[], object]) -> object:
        """Return the score of the run, None if it ended early.

        Args:
            trainer: the trained trainer, which the user's `score` gets.
            loss: returns the loss on held-out data, or None if there is no such data.
        """
        if self.steps_taken < self.trial.steps:
            return None
        return loss() if self.score is None else self.score(trainer)


class OwnRate(NamedTuple):
    """The learning rate that a trainer has by itself.

    Attributes:
        name: its name in the trainer's arguments, or in the module.
        lr: the learning rate.
        is_default: whether it is the default of the class of arguments, which nobody tuned.
    """

    name: str
    lr: float
    is_default: bool = False

    def __str__(self) -> str:
        if self.is_default:
            return f"The default {self.name}={self.lr:.3g}, which nobody tuned,"
        return f"Your {self.name}={self.lr:.3g}"


class Touched(NamedTuple):
    """What a run may change, so that it must be put back after each trial.

    Attributes:
        modules: with their weights, buffers, gradients, hooks and attributes.
        objects: other objects, with their attributes.
        data: data sets, loaders, samplers and collators, with their random generators.
    """

    modules: Sequence[nn.Module]
    objects: Sequence[object] = ()
    data: Sequence[object] = ()


class Trainer(ABC):
    """A trainer of one library. Each library has one subclass, and that one row in `TRAINERS`.

    Args:
        trainer: the object that the user passes to `attach`, `calibrate` or `suggest_lr`.

    Attributes:
        model: the model that trains.
        source: the function whose name a recipe records as the training loop.
        task: the kind of task, if the trainer shows it. At "rl" a step's value is minus the reward.
        batch: the number of examples per optimizer step, None if unknown.
    """

    model: nn.Module
    source: Callable[..., object]
    task: Task | None = None
    batch: float | None = None

    @abstractmethod
    def __init__(self, trainer: External) -> None: ...

    @staticmethod
    @abstractmethod
    def is_one(value: object) -> bool:
        """Return whether an object is a trainer of this library."""

    @abstractmethod
    def steps(self) -> int:
        """Return the number of optimizer steps of the run.

        Raises:
            CalibrationError: the trainer's arguments and data do not determine it.
        """

    def warmup(self, steps: int) -> float:
        """Return the steps over which the learning rate rises in a run of `steps` steps, 0 if the
        trainer does not know them.
        """
        return 0.0

    def known_steps(self) -> int | None:
        """Return the number of optimizer steps of the run, None if it cannot be known beforehand,
        such as for a stream. The trainer is left as it is.
        """
        with suppress(Exception):  # a loader of the user's own
            return self.steps()
        return None

    def own_class(self) -> type[Optimizer] | None:
        """Return the optimizer class that the trainer would build, None if it is unknown."""
        return None

    def own_rate(self) -> OwnRate | None:
        """Return the learning rate at which the trainer would train, None if it has none."""
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the weights that train, None if none do."""
        counts: Counter[torch.dtype] = Counter()
        for param in self.model.parameters():
            if param.requires_grad:
                counts[param.dtype] += param.numel()
        return counts.most_common(1)[0][0] if counts else None

    # --- a real run -------------------------------------------------------------------------------

    @abstractmethod
    def attach(
        self, optimizer: type[Optimizer] | str | None, settings: Settings
    ) -> Report:
        """Let the trainer train with a `RankAwareOptimizer`, and log its learning rates. Return the
        optimizer's report.

        Args:
            optimizer: the optimizer class or its name, None for the one that the trainer would
                build.
            settings: the arguments of `RankAwareOptimizer` and of the optimizer.
        """

    # --- a trial ----------------------------------------------------------------------------------

    @abstractmethod
    def touched(self) -> Touched:
        """Return what a trial may change.

        Raises:
            CalibrationError: trials cannot run in this process.
        """

    @abstractmethod
    def for_trial(self, steps: int, whole: int) -> Trainer:
        """Return the trainer for one trial. Counts of steps in its arguments, such as those of a
        warm-up, are scaled from a run of `whole` steps to a trial of `steps` steps.
        """

    @abstractmethod
    def train(self, run: TrialRun) -> object:
        """Run a trial by the trainer's own loop. Return its score, None if it has none."""
