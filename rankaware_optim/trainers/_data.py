"""Data that a trial does not train on, so that its loss there can score the trial."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice

from torch.utils.data import IterableDataset, Subset

from ._trainer import External

Rows = External  # a data set of torch, of the package datasets, or any other

_PART = 10  # at most a tenth of the rows of the training data is held out
_SEED = 0  # of the choice of rows, which is the same in every trial


def held_out(data: Rows, rows: int) -> tuple[Rows, Rows] | None:
    """Return two parts of the training data: at most `rows` rows, and the rest. Return None if the
    data has too few rows.
    """
    if is_sized(data):
        rows = min(rows, len(data) // _PART)
    return divided(data, rows) if rows else None


def divided(data: Rows, rows: int) -> tuple[Rows, Rows]:
    """Return `rows` rows of a data set, and the rest. The rows are chosen at random, but the same
    ones each time. Of a stream they are the first ones.
    """
    if not is_sized(data):
        return _Stream(data, 0, rows), _Stream(data, rows, None)
    chosen = {*random.Random(_SEED).sample(range(len(data)), min(rows, len(data)))}
    others = [i for i in range(len(data)) if i not in chosen]
    # a data set of the package datasets selects rows itself
    select = getattr(data, "select", None) or partial(Subset, data)
    return select(sorted(chosen)), select(others)


def is_sized(data: Rows) -> bool:
    """Return whether a data set has numbered rows. A stream has none."""
    return hasattr(data, "__len__") and not isinstance(data, IterableDataset)


class _Stream(IterableDataset[object]):
    """The rows of a stream from number `start` up to, and without, number `stop`."""

    def __init__(self, data: Rows, start: int, stop: int | None) -> None:
        super().__init__()
        self.data, self.start, self.stop = data, start, stop

    def __iter__(self) -> Iterator[object]:
        return islice(iter(self.data), self.start, self.stop)
