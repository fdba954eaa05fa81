"""Calibration under DDP or FSDP: one process decides, all get the same rate, curve and recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Replicas:
    """The processes of this training, or only this one if torch.distributed was not started.

    Messages use a separate gloo group. They need no device and cannot mix with those of the
    training.
    """

    def __init__(self) -> None:
        started = (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        self._group = dist.new_group(backend="gloo") if started else None

    @property
    def leads(self) -> bool:
        """Whether this process decides. Only this one uses the study's storage and the terminal."""
        return self._group is None or dist.get_rank() == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """Call `decide` on the leading process. Return its result, or raise its error, on every
        process.
        """
        if self._group is None:
            return decide()
        message: list[Any] = [None]
        if self.leads:
            try:
                message = [(decide(), None)]
            except BaseException as raised:
                message = [(None, raised)]
        dist.broadcast_object_list(message, src=0, group=self._group)
        value, error = message[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def mean(self, value: float) -> float:
        """Return the mean of a value over all processes, each of which has a part of the batch."""
        if self._group is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return float(total) / dist.get_world_size()

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
