"""Provenance of a calibration's code: the training loop's source, its repository's commit, the
imported packages.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

_GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
_PATIENCE_S = 10.0  # timeout for git on a slow disk
_OWN = ("rankaware-optim", "torch", "optuna")


@dataclass(frozen=True)
class Code:
    """A training loop's code at the start of the calibration, as far as it can be read.

    Args:
        train: the function's name.
        hash: the first twelve digits of its source's hash.
        commit: the commit of its git repository, with "-dirty" if files were changed.
        imports: the top-level modules that its file imports.
    """

    train: str = ""
    hash: str = ""
    commit: str = ""
    imports: tuple[str, ...] = ()

    @property
    def loop(self) -> dict[str, str]:
        """Return the values by which two loops are compared."""
        named = {"train": self.train, "its source's hash": self.hash}
        return {key: value for key, value in named.items() if value}

    @property
    def source(self) -> dict[str, str]:
        """Return the values that a recipe stores."""
        named = {"train": self.train, "hash": self.hash, "commit": self.commit}
        return {key: value for key, value in named.items() if value}


def train_source(train: Any) -> Code:
    """Return the code of a training loop, without its partials and decorators."""
    own = inspect.unwrap(train)
    while isinstance(own, partial):
        own = inspect.unwrap(own.func)
    own = own if hasattr(own, "__qualname__") else type(own)
    digits, folder, imports = "", Path.cwd(), set[str]()
    with suppress(OSError, TypeError):
        digits = hashlib.sha256(inspect.getsource(own).encode()).hexdigest()[:12]
        file = Path(inspect.getsourcefile(own) or "")
        folder = file.parent if file.is_file() else folder
        imports = set(_imports("".join(inspect.findsource(own)[0])))
    return Code(own.__qualname__, digits, _commit(folder), tuple(sorted(imports)))


def _imports(source: str) -> Iterator[str]:
    """Yield the modules that a file imports. Yield none if it is not plain Python, such as a
    notebook cell.
    """
    with suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            )
            yield from (name.partition(".")[0] for name in names)


def _commit(folder: Path) -> str:
    """Return the commit of the git repository that contains a folder; "" without a repository or
    without git.
    """
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            _GIT, cwd=folder, check=True, capture_output=True, text=True, timeout=_PATIENCE_S
        )
        return done.stdout.strip()
    return ""


@cache
def _packages() -> Mapping[str, list[str]]:
    """Return the installed packages by module. The result is cached, since the search can take a
    second.
    """
    return packages_distributions()


def versions_used(imports: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, this package, its main dependencies, and the loaded packages
    behind `imports`.
    """
    packages = _packages()
    others = {
        name for module in imports if module in sys.modules for name in packages.get(module, ())
    }
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "python": python,
        **{name: version(name) for name in (*_OWN, *sorted(others - {*_OWN}))},
    }
