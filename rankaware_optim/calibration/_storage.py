"""Storage of a study: a journal file by default, or any Optuna storage by URL. Its errors become
sentences.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import optuna
from filelock import FileLock
from msgspec import ValidationError
from optuna.exceptions import StorageInternalError
from optuna.storages import (
    BaseStorage,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
    get_storage,
)
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import Trial, TrialState, create_trial
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    SQLAlchemyError,
)

from ..errors import CalibrationError
from ._constants import ATTEMPTS, LOCK_S

try:
    import fcntl
except ImportError:  # Windows, whose file systems have locks
    fcntl = None  # type: ignore[assignment]

_OPERATION = b'{"op_code":'  # the beginning of every line of a journal
# By classes of errors: what they say of a storage, and the cure.
_FAILED = (
    "failed",
    "Check that it exists, is writable, has space left, and is not locked by a process that was"
    " stopped. Then the same call continues where it stopped.",
)
_CHANGED = (
    "does not hold what was written to it",
    "If another program deleted, cut or replaced it, restore it from a copy, or name a new one.",
)
_RUNNING = (
    ((OSError, StorageInternalError, SQLAlchemyError), *_FAILED),
    ((ValidationError, KeyError, json.JSONDecodeError), *_CHANGED),
)
_OPENING = (
    (
        (ImportError,),
        "needs a driver that is not installed",
        "Install it, such as psycopg[binary] for postgresql+psycopg://.",
    ),
    ((ArgumentError, ValueError), "is not a storage", "Give a URL or a path."),
    # a driver returns bytes where the encoding is unknown
    (
        (TypeError,),
        "does not return text",
        "If its encoding is SQL_ASCII, create a database with the encoding UTF8.",
    ),
    *_RUNNING,
)


def open_storage(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    """Open an Optuna storage.

    Args:
        storage: a storage, which is returned unchanged, a URL, the path of a journal file, or None
            for memory.

    Raises:
        CalibrationError: the storage cannot be reached or written, lacks its driver, or is a file
            without a study.
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return get_storage(storage)
    if not isinstance(storage, (str, os.PathLike)) or "\0" in str(storage):
        raise CalibrationError(
            f"storage={str(storage)!r} is not a storage.",
            "Give a path, a URL, or an Optuna storage.",
            "storage",
        )
    if isinstance(storage, str) and "://" in storage:
        with storage_errors(storage, _OPENING):
            return _database(storage)
    with storage_errors(storage):
        return _journal(Path(storage))


def place_of(storage: Any) -> Any:
    """Return what two names of one storage share: a journal's real path, a URL, or the object.
    Memory shares nothing.
    """
    if storage is None:
        return object()
    if isinstance(storage, (str, os.PathLike)) and "://" not in str(storage):
        return os.path.realpath(storage)
    return storage


def _database(url: str) -> BaseStorage:
    """Open the database at a URL. Try again if another process creates its tables meanwhile."""
    for _ in range(ATTEMPTS):
        try:
            return get_storage(url)
        except DBAPIError as error:
            is_made = isinstance(error, IntegrityError) or "already exists" in str(
                error
            )
            if not is_made:
                raise
        time.sleep(0.05)
    return get_storage(url)


# --- journals -------------------------------------------------------------------------------------


def _journal(path: Path) -> BaseStorage:
    """Open a journal whose lock the kernel frees when its holder is killed. Optuna's lock file
    would stay for 30 s.
    """
    # A journal has one lock, even if it is reached by different links.
    path = Path(os.path.realpath(path))
    lock = Path(f"{path}.rankaware.lock")  # not PATH.lock, which may be poetry's
    _check_journal(path)
    if lock.exists() and lock.stat().st_size:  # FileLock would empty it
        raise CalibrationError(
            f"The lock {str(lock)!r} is not empty, so it is not ours, and was not changed.",
            "Move it away, or name another journal.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_lockable(lock)
    try:
        return JournalStorage(_JournalFile(path, FileLock(lock, timeout=LOCK_S)))
    except OSError:
        raise
    except Exception as error:  # Optuna may raise anything for a damaged line
        raise CalibrationError(
            f"The journal {str(path)!r} is damaged ({type(error).__name__}: {error}), and was not"
            " changed.",
            "Restore it from a copy, or name a new file.",
        ) from error


def _check_journal(path: Path) -> None:
    """Raise a `CalibrationError` if there is something else, which is left as it is."""
    named = f"storage={str(path)!r}"
    new = "Name a new file, or the journal of a study."
    if not path.exists():
        return
    if not path.is_file():
        raise CalibrationError(f"{named} is not a file.", new, "storage")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"SQLite format 3"):
        raise CalibrationError(
            f"{named} is an SQLite database, but a path means a journal.",
            f"Give 'sqlite:///{path}'.",
            "storage",
        )
    if head and not head.startswith(_OPERATION):
        raise CalibrationError(
            f"{named} is not the journal of a study, and was not changed.",
            new,
            "storage",
        )


def _check_lockable(lock: Path) -> None:
    """Raise a `CalibrationError` if the file system has no file locks, as some network mounts."""
    if fcntl is None:
        return
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another worker has it, so there are locks
            return
        except OSError as error:
            raise CalibrationError(
                f"The file system of {str(lock.parent)!r} has no file locks"
                f" ({error.strerror}), so two workers could spoil the journal.",
                "Name a journal on a local disk, or give the URL of a database.",
                "storage",
            ) from error


class _JournalFile(JournalFileBackend):
    """A journal's file, whose last line may have been cut short by a full disk or a power failure.
    Optuna reads past such a line, but what it appends would become a part of it.
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        super().__init__(str(path), lock_obj=cast(Any, lock))
        self._path = path
        self._ours = lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._ours:
            self._cut()
            super().append_logs(logs)

    def _cut(self) -> None:
        """Cut the file after its last line end."""
        if not self._path.stat().st_size:
            return
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\n":
                return
        whole = self._path.read_bytes().rfind(b"\n") + 1
        os.truncate(self._path, whole)


# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def storage_errors(storage: Any, kinds: Any = _RUNNING) -> Iterator[None]:
    """Turn a storage's errors into a `CalibrationError` with cause and cure.

    kinds: classes of errors, each with what it says of a storage, and the cure.
    """
    is_named = isinstance(storage, (str, os.PathLike))
    place = str(storage) if is_named else type(storage).__name__
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        for classes, says, cure in kinds:
            if isinstance(error, classes):
                named = f"The study's storage {_shown(place)}"
                raise CalibrationError(
                    f"{named} {says}: {_line(error, place)}", cure
                ) from error
        raise


def _line(error: BaseException, url: str) -> str:
    """Return the first line of the root error without the password. sqlalchemy wraps a driver's
    error in paragraphs.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].rstrip(".") + "."
    user = url.partition("://")[2].rpartition("@")[0]
    password = user.partition(":")[2]
    # After an unescaped @ the rest is part of the host.
    for part in filter(None, re.split("[@:/?]", password)):
        line = line.replace(part, "…")
    return line


def _shown(url: str) -> str:
    """Return a path, or a URL without its password and its query, which may contain a password."""
    if "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    name = user.partition(":")[0]
    return f"{scheme}://{name}{at}{host.partition('?')[0]}"


# --- private names of Optuna ----------------------------------------------------------------------
# All that this package uses, where the public API is not enough. A running trial must have its
# setting from its creation, since other processes read it at any time, and `Study.ask` sets
# attributes later. Database connections and journal locks are released, which Optuna's wrappers
# hide. tests/calibration/test_optuna.py fails if one of these names changes.


def begin_trial(study: Study, attributes: Mapping[str, Any]) -> Trial:
    """Create a running trial that has `attributes` from the start."""
    template = create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
    return Trial(study, study._storage.create_new_trial(study._study_id, template))


def close_storage(storage: BaseStorage) -> None:
    """Release a database's connections, or a journal's lock that an interrupt left held."""
    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage):
        backend.remove_session()
        backend.engine.dispose()
    elif isinstance(backend, JournalFileBackend):
        cast(Any, backend._lock).release(force=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna below warnings, and restore its level afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
