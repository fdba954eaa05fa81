"""Registries of named factories: built-ins, then entry points, which are loaded when needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ._warn import warn
from .errors import RankAwareError


class Registry:
    """A table of named factories. The entry points of `group` are added at the first unknown name.

    A plug-in that cannot be imported gives a warning with its name. It is an error only for its
    users.
    """

    def __init__(self, group: str, what: str, error: type[RankAwareError]) -> None:
        self._group = group
        self._what = what
        self._error = error
        self._builtin: dict[str, Callable[..., Any]] = {}
        self._plugins: dict[str, Callable[..., Any]] | None = None

    def register(self, name: str, factory: Callable[..., Any] | str) -> None:
        """Register a factory, or its location as "module:name", under `name`."""
        if isinstance(factory, str):
            place = EntryPoint(name, factory, self._group)
            factory = lambda: place.load()()  # noqa: E731
        self._builtin[name] = factory

    def names(self) -> list[str]:
        """Return all known names, built-in and installed, sorted."""
        return sorted({*self._builtin, *self._installed()})

    def get(self, name: str) -> Callable[..., Any]:
        """Return the factory called `name`. The error for an unknown name lists the known ones."""
        if name in self._builtin:
            return self._builtin[name]
        if name in self._installed():
            return self._installed()[name]
        raise self._error(
            f"Unknown {self._what} {name!r}.",
            f"Known are {', '.join(self.names())}. A package adds one by the entry point group"
            f" {self._group!r}.",
        )

    def _installed(self) -> dict[str, Callable[..., Any]]:
        if self._plugins is None:
            found = (
                (point.name, _load(point)) for point in entry_points(group=self._group)
            )
            self._plugins = {
                name: factory for name, factory in found if factory is not None
            }
        return self._plugins


def _load(point: EntryPoint) -> Callable[..., Any] | None:
    try:
        factory: Callable[..., Any] = point.load()
        return factory
    except (
        Exception,
        SystemExit,
    ) as error:  # a third-party package may raise anything on import, or exit
        warn(
            f"The plug-in {point.name!r} ({point.value}) could not be loaded: {error}."
        )
        return None
