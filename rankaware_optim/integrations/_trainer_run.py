"""One trial of a calibration that runs inside a trainer: what every kind of trainer is handed, and what it reports."""

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
    """The trial, the optimizer's class and settings, what scores the run, and the loss of the step under way.

    metric: a name among the evaluation's, a function of the trainer, or None for the mean of the last losses.
    report: takes a step's loss and answers whether the run is to end.
    """

    trial: Trial
    native: type[Optimizer]
    settings: Mapping[str, Any]
    metric: str | Callable[[Any], Any] | None
    report: Callable[[Any], bool]
    steps_taken: int = 0
    _loss: Any = 0.0

    def optimizer(self, model: Any) -> Any:
        """The trial's optimizer over the model."""
        return self.trial.optimizer(model, **self.settings)

    def steps_of(self, max_steps: int | None) -> int:
        """How many steps the trainer takes: its own where it sets them, else the trial's."""
        planned = self.trial._steps  # trial.steps is for those who plan by it
        if max_steps is not None and max_steps < planned:
            raise CalibrationError(
                f"The trainer's max_steps is {max_steps}, less than the trial's {planned}.", "Lower steps=."
            )
        return self.trial.steps if max_steps is None else max_steps

    def add(self, loss: torch.Tensor) -> None:
        """Add a batch's loss, divided by how many batches there are to a step."""
        self._loss = self._loss + loss.detach()

    def end_step(self) -> bool:
        """Report the step's loss. The answer is whether the run is to end."""
        loss, self._loss = self._loss, 0.0
        self.steps_taken += 1
        return self.report(loss)

    def score(self, trainer: Any, evaluate: Callable[[], Mapping[str, Any]]) -> Any:
        """The score of a run that took all its steps; None where there is none to take."""
        if self.metric is None or self.steps_taken < self.trial._steps:
            return None
        if callable(self.metric):
            return self.metric(trainer)
        found = evaluate()
        if self.metric not in found:
            raise CalibrationError(f"The evaluation gave no {self.metric!r}.", f"It gave {', '.join(sorted(found))}.")
        return found[self.metric]
