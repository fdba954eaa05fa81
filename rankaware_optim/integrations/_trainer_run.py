"""One trial of a calibration that runs inside a trainer of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ..calibration import Trial
from ..errors import CalibrationError


@dataclass
class TrainerRun:
    """The trial, the optimizer's class and settings, the score, and the loss of the current step.

    metric: the name of an evaluation metric, a function of the trainer, or None for the mean of the
    last losses. report: gets a step's loss and returns whether the run must end.
    """

    trial: Trial
    native: type[Optimizer]
    settings: Mapping[str, Any]
    metric: str | Callable[[Any], Any] | None
    report: Callable[[Any], bool]
    steps_taken: int = 0
    _loss: Any = 0.0

    def optimizer(self, model: Any) -> Any:
        """Return the trial's optimizer for the model."""
        return self.trial.optimizer(model, **self.settings)

    def steps_of(self, max_steps: int | None) -> int:
        """Return the trainer's number of steps: its own if it sets one, else the trial's."""
        planned = self.trial._steps  # reading trial.steps would count as using it
        if max_steps is not None and max_steps < planned:
            raise CalibrationError(
                f"The trainer's max_steps is {max_steps}, less than the trial's {planned}.",
                "Lower steps=.",
            )
        return self.trial.steps if max_steps is None else max_steps

    def add(self, loss: torch.Tensor) -> None:
        """Add a batch's loss, divided by the number of batches per step."""
        self._loss = self._loss + loss.detach()

    def end_step(self) -> bool:
        """Report the step's loss. Return whether the run must end."""
        loss, self._loss = self._loss, 0.0
        self.steps_taken += 1
        return self.report(loss)

    def score(self, trainer: Any, evaluate: Callable[[], Mapping[str, Any]]) -> Any:
        """Return the score of a run that took all its steps, or None if there is none."""
        if self.metric is None or self.steps_taken < self.trial._steps:
            return None
        if callable(self.metric):
            return self.metric(trainer)
        found = evaluate()
        if self.metric not in found:
            raise CalibrationError(
                f"The evaluation has no {self.metric!r}.", f"It has {', '.join(sorted(found))}."
            )
        return found[self.metric]
