"""Extensions by name: built in, registered, or from an installed package's entry point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar

from ._checks import shown
from .errors import RankAwareError

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """What is known of one kind of extension, which has a `name`.

    group: the entry points of other packages.
    """

    kind: type[T]
    group: str
    built_in: Mapping[str, T]
    error: type[RankAwareError]
    registered: dict[str, T] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, T]:
        return {**self.built_in, **self.registered}

    def register(self, item: Any, *, remove: bool = False) -> None:
        self.checked(item)
        if remove:
            self.registered.pop(item.name, None)
        elif self.known.get(item.name, item) == item:
            self.registered[item.name] = item
        else:
            raise self.error(
                f"Another {self.kind.__name__} is called {item.name!r}.",
                "Give yours another name.",
            )

    def load(self, point: EntryPoint) -> T:
        """Return what an entry point leads to, or an instance of it if it is a class."""
        try:
            item: Any = point.load()
            item = item() if isinstance(item, type) else item
        except (Exception, SystemExit) as error:  # third-party code may raise anything
            raise self.error(
                f"{point.name!r} cannot be loaded: {error}.",
                "Give 'package.module:name', importable from here.",
            ) from error
        return self.checked(item)

    def checked(self, item: Any) -> T:
        if not isinstance(item, self.kind):
            raise self.error(
                f"{shown(item)} is not a {self.kind.__name__}.",
                f"Give an instance of rankaware_optim.{self.kind.__name__}.",
            )
        return item
