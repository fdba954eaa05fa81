"""What a pair consists of: tensors of a model, or of a file."""

from __future__ import annotations

from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """A tensor in a file, of which the shape is known."""

    shape: Shape
    is_meta: bool = True


class Half(NamedTuple):
    """One of a pair's two tensors, with its name relative to the owner, or in a file."""

    name: str
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def is_shard(self) -> bool:
        """Whether it is the shard of one process: flat under FSDP1, empty under ZeRO-3."""
        is_whole = isinstance(self.tensor, Stored)
        return not is_whole and (len(self.shape) < 2 or 0 in self.shape)


class StoredLayer:
    """A layer of a file, which owns pairs as a module does. What is stored or declared of it is an
    attribute.

    where: its name in error messages. halves: its factors by attribute and adapter.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.init: bool | str | None = None
        self.halves: dict[tuple[str, str], Half] = {}

    def halves_of(self, attribute: str, by_adapter: bool) -> dict[str, Half]:
        """Return the factors of an attribute by adapter, or the one without an adapter."""
        return {
            adapter: half
            for (name, adapter), half in self.halves.items()
            if name == attribute and (by_adapter or not adapter)
        }
