"""Where a study is kept: a journal file by default, any Optuna storage by URL; what goes wrong there, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..errors import CalibrationError

_FAILURES = (OSError, StorageInternalError, SQLAlchemyError)


def open_storage(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    """Optuna's storage: itself, one at a URL, a journal file at a path, or memory.

    Raises:
        CalibrationError: it is away, cannot be written, or lacks its driver.
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return get_storage(storage)
    with storage_errors(storage):
        if not (isinstance(storage, str) and "://" in storage):
            return _journal(Path(storage))
        try:
            return get_storage(storage)
        except ImportError as error:
            raise CalibrationError(
                f"The storage {_shown(storage)} needs a driver that is not installed: {_line(error)}",
                "Install it, such as psycopg[binary] for postgresql+psycopg://.",
            ) from error
        except (ValueError, ArgumentError) as error:
            cause = f"storage={_shown(storage)!r} is no storage: {_line(error)}"
            raise CalibrationError(cause, "Give a URL or a path.") from error


def _journal(path: Path) -> BaseStorage:
    """A journal whose lock the kernel frees when its holder is killed. Optuna's own lock file would stay for 30 s.

    A last line that was cut short, by a full disk or a power failure, is dropped: the journal could not be read.
    """
    if path.exists() and not path.is_file():
        raise CalibrationError(f"storage={str(path)!r} is no file.", "Name a file for the journal, or a URL.")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    if path.is_file():
        with lock:
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=cast(Any, lock)))


@contextmanager
def storage_errors(storage: Any = None) -> Iterator[None]:
    """What a storage raises becomes a sentence with its cure."""
    try:
        yield
    except _FAILURES as error:
        shown = f" {_shown(str(storage))}" if isinstance(storage, (str, os.PathLike)) else ""
        raise CalibrationError(
            f"The study's storage{shown} failed: {_line(error)}",
            "See that it is there, writable and has space left; then the same call goes on where this one stopped.",
        ) from error


def _line(error: BaseException) -> str:
    """The root's first line: sqlalchemy wraps a driver's error in paragraphs."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."


def _shown(url: str) -> str:
    """A URL without its password."""
    scheme, found, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}@{host}" if found and at else url
