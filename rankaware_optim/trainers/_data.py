"""This module splits the training data of a trial into rows to train on and held-out
rows.

The score of a trial is its loss on the held-out rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice

from torch.utils.data import IterableDataset, Subset

from ._trainer import External

Rows = External  # a data set of torch, of the package datasets, or any other

# At most one row in 10 is held out, so that a small data set still has rows to train on.
_PART = 10
# The seed is constant, so that every trial is scored on the same rows. Otherwise the
# scores of two trials would also differ because of the data.
_SEED = 0


def held_out(data: Rows, rows: int) -> tuple[Rows, Rows] | None:
    """Split training data into at most `rows` held-out rows and the remaining rows.

    Return None if the training data has too few rows to be split.
    """
    # the length of a stream is unknown, so the number of its rows cannot be limited
    if is_sized(data):
        rows = min(rows, len(data) // _PART)
    return divided(data, rows) if rows else None


def divided(data: Rows, rows: int) -> tuple[Rows, Rows]:
    """Split a data set into two: one with `rows` of its rows, and one with the
    remaining rows.

    The rows of the first data set are chosen at random, but every call chooses the same
    rows. If the data set is a stream, the first rows of the stream are chosen.
    """
    if not is_sized(data):
        return _Stream(data, 0, rows), _Stream(data, rows, None)
    # a separate generator, so that the user's random state does not change
    chosen = {*random.Random(_SEED).sample(range(len(data)), min(rows, len(data)))}
    others = [i for i in range(len(data)) if i not in chosen]
    # A data set of the package `datasets` selects rows itself. The result is again such a
    # data set, as trainers expect because they read its columns. Other objects, such as
    # tensors, may have a method of the same name that does something else.
    select = data.select if hasattr(data, "column_names") else partial(Subset, data)
    return select(sorted(chosen)), select(others)


def is_sized(data: Rows) -> bool:
    """Return whether a data set has a known length. A stream of data has none."""
    # some streams define __len__ too, but their rows cannot be selected by number
    return hasattr(data, "__len__") and not isinstance(data, IterableDataset)


class _Stream(IterableDataset[object]):
    """The rows of a data stream from row `start` up to, but not including, row
    `stop`.
    """

    def __init__(self, data: Rows, start: int, stop: int | None) -> None:
        self.data, self.start, self.stop = data, start, stop

    def __iter__(self) -> Iterator[object]:
        return islice(iter(self.data), self.start, self.stop)
