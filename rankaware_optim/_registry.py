"""This module stores extensions by name and loads them from installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Generic, TypeVar

from ._checks import shown
from .errors import RankAwareError

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The extensions of one kind. Each has a `name`.

    kind: their class. group: the entry point group in which other packages list theirs. built_in:
    the extensions of this package. error: the class of errors about them. registered: the
    extensions that the user added.
    """

    kind: type[T]
    group: str
    built_in: Mapping[str, T]
    error: type[RankAwareError]
    registered: dict[str, T] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, T]:
        return {**self.built_in, **self.registered}

    def register(self, item: object, *, remove: bool = False) -> None:
        """Add an extension, or remove it if `remove` is True.

        If a different extension already has the same name, adding this extension raises
        an error.
        """
        checked = self.checked(item)
        name: str = checked.name  # type: ignore[attr-defined]
        if remove:
            self.registered.pop(name, None)
        elif self.known.get(name, checked) == checked:
            self.registered[name] = checked
        else:
            kind = self.kind.__name__
            raise self.error(
                f"Another {kind} is already called {name!r}.",
                f"Choose a different `name` for your {kind}.",
            )

    def load(self, point: EntryPoint) -> T:
        """Import the class or object that an entry point of an installed package refers to. A class
        is instantiated.
        """
        try:
            item: object = point.load()
        except (Exception, SystemExit) as error:  # third-party code may raise anything
            path, kind = point.name, type(error).__name__
            raise self.error(
                f"{path!r} cannot be imported. Python raised {kind}: {error}.",
                "Pass a path such as package.module:name, and make sure that Python can import the"
                " module from the current folder.",
            ) from error
        if isinstance(item, type):
            item = self._instance(item, point)
        return self.checked(item)

    def _instance(self, item: type, point: EntryPoint) -> object:
        path, kind = point.name, self.kind.__name__
        if not issubclass(item, self.kind):
            raise self.error(
                f"The class {path!r} is not a subclass of rankaware_optim.{kind}.",
                f"Let the class inherit from rankaware_optim.{kind}, or pass another class.",
            )
        try:
            return item()
        except Exception as error:
            raise self.error(
                f"The class {path!r} cannot be called without arguments: {error}.",
                "Set a default for every field of the class.",
            ) from error

    def checked(self, item: object) -> T:
        """Check that an extension is an instance of its base class, and return it."""
        if not isinstance(item, self.kind):
            value, kind = shown(item), self.kind.__name__
            raise self.error(
                f"{value} is not an instance of rankaware_optim.{kind}.",
                f"Pass an instance of a class that inherits from rankaware_optim.{kind}.",
            )
        return item
