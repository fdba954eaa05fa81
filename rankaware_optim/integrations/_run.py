"""A trial that a trainer runs, and data that it does not train on, for its score.

Importing this module imports no trainer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.utils.data import IterableDataset, Subset

if TYPE_CHECKING:
    from ..calibration import Trial


BATCHES = 16
"""Batches that score a trial, at most."""
PART = 10
"""One of so many rows of the training data is held out, at most."""
_SEED = 0  # of the rows that are chosen, the same for every trial


@dataclass
class TrainerRuns:
    """The runs of trainers: what all have, and the trial that runs.

    Args:
        native: the optimizer's class.
        settings: the optimizer's.
        score: a function of the trainer, or None for the loss on data held out.
        built: whether the trainer was built before the calibration.
        batch: examples a step, once known.
        warmup: share of the steps with a rising rate, once known.
        by_reward: whether a step's value is minus a reward.
        like: an optimizer at whose rates a module's own one trains.
    """

    native: type[Optimizer]
    settings: Mapping[str, Any]
    score: Callable[[Any], Any] | None
    built: bool
    batch: float | None = None
    warmup: float | None = None
    by_reward: bool = False
    like: Any = None
    _loss: Any = field(default=0.0, repr=False)

    def begin(self, trial: Trial, report: Callable[[Any], bool]) -> None:
        """Begin a trial. report: gets a step's value and returns whether the run must end."""
        self.trial, self._report = trial, report
        self.steps_taken, self._loss = 0, 0.0

    def add(self, loss: torch.Tensor) -> None:
        """Add a batch's loss, divided by the number of batches per step."""
        self._loss = self._loss + loss.detach()

    def end_step(self, value: Any = None) -> bool:
        """Report the step's value, by default its loss. Return whether the run must end."""
        loss, self._loss = self._loss, 0.0
        self.steps_taken += 1
        return self._report(loss if value is None else value)

    def result(self, trainer: Any, loss: Callable[[], Any]) -> Any:
        """Return the score of a run that took all its steps, or None if there is none. loss:
        returns that on data held out, or None.
        """
        if self.steps_taken < self.trial.steps:
            return None
        return loss() if self.score is None else self.score(trainer)


# --- data held out --------------------------------------------------------------------------------


def is_sized(data: Any) -> bool:
    """Return whether a data set has numbered rows, and is no stream."""
    return hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def divided(data: Any, rows: int) -> tuple[Any, Any]:
    """Return so many rows of a data set, and the rest of them: fixed ones chosen by chance, or the
    first ones of a stream.
    """
    if not is_sized(data):
        return _Stream(data, 0, rows), _Stream(data, rows, None)
    chosen = {*random.Random(_SEED).sample(range(len(data)), min(rows, len(data)))}
    others = [i for i in range(len(data)) if i not in chosen]
    select = getattr(data, "select", None)  # of datasets
    if select is not None:
        return select(sorted(chosen)), select(others)
    return Subset(data, sorted(chosen)), Subset(data, others)


class _Stream(IterableDataset[Any]):
    """The rows of a stream from one number on to another."""

    def __init__(self, data: Any, start: int, stop: int | None) -> None:
        super().__init__()
        self.data, self.start, self.stop = data, start, stop

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), self.start, self.stop)
