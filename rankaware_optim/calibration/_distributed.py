"""Under DDP or FSDP: one process decides, the others hear of it; all see one rate, one curve and one recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Replicas:
    """The processes of this training, or this one alone where torch.distributed was not started.

    Messages go over a gloo group of their own, so that they need no device and mix with nothing of the training.
    """

    def __init__(self) -> None:
        started = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if started else None

    @property
    def leads(self) -> bool:
        """Whether this process decides: it alone talks to the study's storage and to the terminal."""
        return self._group is None or dist.get_rank() == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """What `decide` returns or raises on the leading process, on every process."""
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
        """The mean of a value over all processes, each of which saw its own part of the batch."""
        if self._group is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return float(total) / dist.get_world_size()

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
