"""The loss of a trainer of transformers on data that it does not train on.

Importing this module imports no trainer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset

BATCHES = 16
"""Batches that score a trial, at most."""
SHARE = 10
"""One of so many rows of the training data is held out, at most."""
_SEED = 0  # of the rows that are chosen, the same for every trial


def hold_out(trainer: Any) -> list[Any]:
    """Return data sets for a trainer's score, of at most `BATCHES` batches: parts of its
    `eval_dataset`. Where it has none, they are taken out of its training data, [] if there are too
    few.
    """
    args, given = trainer.args, trainer.eval_dataset
    rows = BATCHES * args.eval_batch_size * args.world_size
    if isinstance(given, Mapping) and given:
        return [divided(each, rows // len(given))[0] for each in given.values()]
    if given is not None:
        return [divided(given, rows)[0]]
    data = trainer.train_dataset
    if is_sized(data):
        rows = min(rows, len(data) // SHARE)
    if data is None or not rows:
        return []
    part, trainer.train_dataset = divided(data, rows)
    return [part]


@torch.no_grad()
def held_out_loss(trainer: Any, parts: list[Any]) -> float | None:
    """Return the mean loss over the batches of some data sets, None if there are none."""
    model, losses = trainer.model, []
    model.eval()
    if callable(getattr(trainer.optimizer, "eval", None)):  # schedule-free optimizers
        trainer.optimizer.eval()
    for part in parts:
        for batch in trainer.get_eval_dataloader(part):
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                losses.append(trainer.compute_loss(model, inputs).float().mean())
    return float(torch.stack(losses).mean()) if losses else None


def is_sized(data: Any) -> bool:
    """Return whether a data set has numbered rows, and is no stream."""
    return hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def divided(data: Any, rows: int) -> tuple[Any, Any]:
    """Return so many rows of a data set, and the rest of them: fixed ones chosen by chance, or the
    first ones of a stream.
    """
    if not is_sized(data):
        if hasattr(data, "take") and hasattr(data, "skip"):  # of datasets
            return data.take(rows), data.skip(rows)
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
