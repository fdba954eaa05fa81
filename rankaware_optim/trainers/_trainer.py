"""This module defines the methods that every supported trainer needs.

Importing this module does not import any training library except torch.
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

# An object of another library. The library may not be installed, so its classes cannot be
# used as types.
External: TypeAlias = Any
# Arguments of an optimizer, and of `RankAwareOptimizer`
Settings: TypeAlias = dict[str, Any]

BATCHES = 16
"""The largest number of held-out batches on which a trial is scored."""


class AnyTrial(Protocol):
    """Lists the attributes of `rankaware_optim.Trial` that a trainer uses."""

    # A protocol, because `Trial` belongs to the package calibration, which this package
    # must not import.

    seed: int

    @property
    def steps(self) -> int: ...

    @property
    def lr(self) -> float | None: ...

    def optimizer(
        self, params: External, /, **settings: object
    ) -> RankAwareOptimizer: ...


class Runner(Protocol):
    """Lists the methods of `calibration.TrialRunner` that a trainer calls during a trial."""

    def report(self, value: object) -> bool: ...

    def follow(self, opt: Optimizer) -> None: ...


@dataclass
class TrialRun:
    """Represents one trial of a calibration that a trainer is running.

    Args:
        trial: the trial.
        runner: receives the value of each step, and decides whether the run must end.
        native: the optimizer class that is calibrated.
        settings: the settings of the optimizer.
        score: the user's function that scores the trained trainer. If it is None, the score
            is the loss on held-out data.
        existing: whether the trainer existed before the calibration. If it did, the trial's
            learning rate is set in the trainer. If the user's function built the trainer,
            the function has already passed the trial's optimizer to the trainer.
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
        """Report the loss or negative reward of a training step, and return whether the
        trial must end.
        """
        # Callbacks compare this number with the trainer's counter to recognize a new step.
        self.steps_taken += 1
        return self.runner.report(value)

    def follow(self, opt: Optimizer, stand_in: RankAwareOptimizer) -> None:
        """Record the learning rates of an optimizer that the trainer built itself.

        Args:
            opt: the optimizer that trains the model.
            stand_in: the trial's optimizer for the same model, which does not train. The
                trial has only a weak reference to it, so this object stores it.
        """
        self._stand_in = stand_in
        self.runner.follow(opt)

    def result(self, trainer: External, loss: Callable[[], object]) -> object:
        """Return the score of the trial, or None if the trial ended early.

        Args:
            trainer: the trained trainer, which is passed to the user's `score`.
            loss: a function that returns the loss on held-out data, or None if there is no
                such data.
        """
        # A run that was stopped has no comparable score. `loss` is a function, because
        # such a run need not be evaluated.
        if self.steps_taken < self.trial.steps:
            return None
        return loss() if self.score is None else self.score(trainer)


class OwnRate(NamedTuple):
    """Contains the learning rate in a trainer's arguments or in a Lightning module.

    Attributes:
        name: the name of the argument or of the module's attribute.
        lr: the learning rate.
        is_default: whether the user left the library's default unchanged, so that nobody
            tuned this learning rate.
    """

    name: str
    lr: float
    is_default: bool = False

    def __str__(self) -> str:
        if self.is_default:
            return f"The default {self.name}={self.lr:.3g}, which nobody tuned,"
        return f"Your {self.name}={self.lr:.3g}"


class Touched(NamedTuple):
    """Lists the objects of a trainer that a trial may change, so that they must be
    restored after each trial.

    Attributes:
        modules: modules, which are restored with their weights, buffers, gradients, hooks and
            attributes.
        objects: other objects, which are restored with their attributes.
        data: data sets, loaders, samplers and collators, which are restored with their random
            generators.
    """

    modules: Sequence[nn.Module]
    objects: Sequence[object] = ()
    data: Sequence[object] = ()


class Trainer(ABC):
    """The base class of all classes that wrap a trainer of a training library.

    To support another training library, write a subclass of this class and add it to
    `TRAINERS`.

    Args:
        trainer: the object that the user passes to `attach`, `calibrate` or `suggest_lr`.

    Attributes:
        model: the model that trains.
        source: the function whose name a recipe records as the training loop.
        task: the kind of task, if the trainer's class reveals it. If it is "rl", the value
            of a step is minus the reward.
        batch: the number of examples per optimizer step, or None if unknown.
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
        """Return whether an object is a trainer that this class supports."""

    @abstractmethod
    def steps(self) -> int:
        """Return the number of optimizer steps of the run.

        Raises:
            CalibrationError: the trainer's arguments and data do not determine it.
        """

    def warmup(self, steps: int) -> float:
        """Return the number of warm-up steps in a run of `steps` steps.

        Return 0 if the number of warm-up steps of the trainer is unknown.
        """
        return 0.0

    def known_steps(self) -> int | None:
        """Return the number of optimizer steps of the trainer's run without changing
        the trainer.

        Return None if the number of steps is unknown before the run, for example
        because the training data is a stream.
        """
        # The user's data loader may raise anything. The number only improves a suggestion,
        # which also works without it.
        with suppress(Exception):
            return self.steps()
        return None

    def own_class(self) -> type[Optimizer] | None:
        """Return the class of the optimizer that the trainer would build, or None if
        this class is unknown.
        """
        return None

    def own_rate(self) -> OwnRate | None:
        """Return the learning rate that is set in the trainer, or None if the trainer
        has no learning rate.
        """
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the trained weights, or None if all weights are frozen."""
        # Norms are often float32 in a bfloat16 model, so the elements are counted.
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
        """Make the trainer use a `RankAwareOptimizer`, and return the optimizer's report.

        From then on, the trainer also logs the learning rate of each LoRA rank.

        Args:
            optimizer: the optimizer class or its name. None means the class that the
                trainer would build.
            settings: the arguments of `RankAwareOptimizer` and of the optimizer.
        """

    # --- a trial ----------------------------------------------------------------------------------

    @abstractmethod
    def touched(self) -> Touched:
        """Return the trainer's objects that a trial may change, such as its model and
        data sets.

        Raises:
            CalibrationError: trials cannot run in this process.
        """

    @abstractmethod
    def for_trial(self, steps: int, whole: int) -> Trainer:
        """Return a trainer that runs a single trial of `steps` optimizer steps.

        Numbers of steps in the trainer's arguments, such as the length of the warm-up, are
        scaled down in proportion to the length of the trial.

        Args:
            steps: the number of optimizer steps of the trial.
            whole: the number of optimizer steps of the whole run.
        """

    @abstractmethod
    def train(self, run: TrialRun) -> object:
        """Run a trial in the trainer's own training loop, and return the score of the
        trial.

        Return None if the score of the trial is unknown.
        """
