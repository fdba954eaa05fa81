"""Storage of a study: a journal file by default, or any Optuna storage by URL. Its errors become
sentences.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from msgspec import ValidationError
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import (
    BaseStorage,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
    get_storage,
)
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from ..errors import CalibrationError

_FAILURES = (OSError, StorageInternalError, SQLAlchemyError)
# to create a database while other processes do; each failure means that one of 13 tables exists now
_ATTEMPTS = 30
# seconds to wait for a journal's lock, which a stopped process may hold
_LOCK_S = 120.0
_OPERATION = b'{"op_code":'  # the beginning of every line of a journal


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
            f"storage={_shown(str(storage))!r} is not a storage.",
            "Give a path, a URL, or an Optuna storage.",
            "storage",
        )
    with storage_errors(storage):
        if not (isinstance(storage, str) and "://" in storage):
            return _journal(Path(storage))
        name = _shown(storage)
        try:
            return _database(storage)
        except ImportError as error:
            raise CalibrationError(
                f"The storage {name} needs a driver that is not installed: {_line(error, storage)}",
                "Install it, such as psycopg[binary] for postgresql+psycopg://.",
            ) from error
        except (ValueError, ArgumentError) as error:
            raise CalibrationError(
                f"storage={name!r} is not a storage: {_line(error, storage)}",
                "Give a URL or a path.",
                "storage",
            ) from error
        # a driver returns bytes where the encoding is unknown
        except TypeError as error:
            raise CalibrationError(
                f"The database {name} does not return text: {_line(error, storage)}",
                "If its encoding is SQL_ASCII, create one with the encoding UTF8.",
            ) from error


def _database(url: str, attempts: int = _ATTEMPTS) -> BaseStorage:
    """Open the database at a URL. Try again if another process creates its tables meanwhile."""
    try:
        return get_storage(url)
    except (IntegrityError, OperationalError, ProgrammingError) as error:
        is_other = isinstance(error, OperationalError)
        lost_race = not is_other or "already exists" in str(error)
        if attempts == 1 or not lost_race:
            raise
    time.sleep(0.05)
    return _database(url, attempts - 1)


def _journal(path: Path) -> BaseStorage:
    """Open a journal whose lock the kernel frees when its holder is killed. Optuna's lock file
    would stay for 30 s.
    """
    if path.exists() and not path.is_file():
        raise CalibrationError(
            f"storage={str(path)!r} is not a file.",
            "Name a file for the journal, or a URL.",
            "storage",
        )
    # A journal has one lock, even if it is reached by different links.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(path)
    if path.is_file() and path.stat().st_size:
        _check_journal(path)
        with lock:
            _repair(path)
    try:
        return JournalStorage(_JournalFile(path, lock))
    except OSError:
        raise
    except Exception as error:  # Optuna may raise anything for a damaged line
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _lock_of(path: Path) -> FileLock:
    """Return the lock of a journal. Raise a `CalibrationError` if its file has content, since
    FileLock empties it.
    """
    beside = Path(f"{path}.rankaware.lock")  # not PATH.lock, which may be poetry's
    if beside.exists() and beside.stat().st_size:
        raise CalibrationError(
            f"The lock {str(beside)!r} is not empty, so it is not ours, and was not changed.",
            "Move it away, or name another journal.",
        )
    return FileLock(beside, timeout=_LOCK_S)


class _JournalFile(JournalFileBackend):
    """A journal's file, which notices if another program deletes, replaces or cuts it."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        super().__init__(str(path), lock_obj=cast(Any, lock))
        self._path = path
        self._journal_lock = lock
        self._inode = path.stat().st_ino
        self._written = 0

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        self._check()
        yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._journal_lock:
            self._check()
            super().append_logs(logs)
            # What others append may be cut, if they are killed meanwhile.
            self._written = self._path.stat().st_size

    def _check(self) -> None:
        now = self._path.stat()
        if now.st_ino != self._inode or now.st_size < self._written:
            raise OSError("Another program replaced or cut the file during the run.")


def _check_journal(path: Path) -> None:
    """Raise a `CalibrationError` if a file does not begin like a journal."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"SQLite format 3"):
        cause = (
            f"storage={str(path)!r} is an SQLite database, but a path means a journal."
        )
        raise CalibrationError(cause, f"Give 'sqlite:///{path}'.", "storage")
    if not head.startswith(_OPERATION):
        cause = (
            f"storage={str(path)!r} is not the journal of a study, and was not changed."
        )
        raise CalibrationError(
            cause, "Name a new file, or the journal of a study.", "storage"
        )


def _repair(path: Path) -> None:
    """Remove a last line that was cut short by a full disk or a power failure, since Optuna cannot
    read it.
    """
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        whole = data.rfind(b"\n") + 1
        last = data[data.rfind(b"\n", 0, max(whole - 1, 0)) + 1 : whole]
        rest = data[whole:]
    begun = rest.rstrip(b"\0")  # the file may have grown before its data was written
    if not begun.startswith(_OPERATION[: len(begun)]) or (last and not _is_json(last)):
        raise _damaged(path, "its last line is not from Optuna")
    if _is_json(rest):
        with path.open("ab") as end:
            end.write(b"\n")
    elif rest:
        os.truncate(path, whole)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _damaged(path: Path, what: str) -> CalibrationError:
    return CalibrationError(
        f"The journal {str(path)!r} is damaged ({what}), and was not changed.",
        "Restore it from a copy, or name a new file.",
    )


@contextmanager
def storage_errors(storage: Any) -> Iterator[None]:
    """Turn a storage's errors into a `CalibrationError` with cause and cure.

    Optuna and its drivers raise errors of any type, and so does a user's sampler or pruner. So an
    error is a storage's if it was raised inside one.
    """
    try:
        yield
    except (CalibrationError, UpdateFinishedTrialError):
        raise  # a sentence already; another worker has taken the trial over
    except Exception as error:
        if not _is_in_storage(error) and not isinstance(error, ValidationError):
            raise
        place = str(storage) if isinstance(storage, (str, os.PathLike)) else ""
        raise _failure(error, place) from error


def _failure(error: Exception, place: str) -> CalibrationError:
    named = f"The study's storage {_shown(place)}".rstrip()
    line = _line(error, place)
    if isinstance(error, Timeout):
        return CalibrationError(
            f"{named} was locked by another process for {_LOCK_S:g} s.",
            "Let that process go on, or end it. Then the same call continues where it stopped.",
        )
    if isinstance(error, _FAILURES):
        return CalibrationError(
            f"{named} failed: {line}",
            "Check that it exists, is writable and has space left. Then the same call continues"
            " where it stopped.",
        )
    return CalibrationError(
        f"{named} does not hold what was written to it ({type(error).__name__}: {line[:-1]}).",
        "If another program deleted, cut or replaced it, restore it from a copy, or name a new"
        " one.",
    )


def _is_in_storage(error: BaseException) -> bool:
    return any(
        isinstance(frame.f_locals.get("self"), BaseStorage) or frame.f_code in _OPENING
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def first_line(error: BaseException) -> str:
    """Return an error's first line as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def _line(error: BaseException, url: str) -> str:
    """Return the first line of the root error without the password. sqlalchemy wraps a driver's
    error in paragraphs.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    line = first_line(error)
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


# Functions of this module that touch a storage before it is an object.
_OPENING = {function.__code__ for function in (_journal, _database)}


# --- private names of Optuna ----------------------------------------------------------------------
# All that this package uses, where the public API is not enough. Several processes share one
# storage, and a process may die at any time. So a trial must name its owner from its creation.
# `Study.ask` cannot do this, because it sets attributes later. A trial whose process died is marked
# and failed by another process. `Study.tell` would raise if a third process had been first.
# Database connections and journal locks are released, which Optuna's wrappers hide.
# tests/calibration/test_optuna.py fails if one of these names changes.


def begin_trial(
    study: Study, attributes: Mapping[str, Any], params: Mapping[str, float]
) -> Trial:
    """Create a running trial that has `attributes` from the start, and fixed `params` if given."""
    template = create_trial(
        state=TrialState.RUNNING,
        user_attrs=dict(attributes),
        system_attrs={"fixed_params": dict(params)} if params else {},
    )
    return Trial(study, study._storage.create_new_trial(study._study_id, template))


def fail_killed(study: Study, trial: FrozenTrial) -> None:
    """Mark another process's running trial as killed and fail it, unless another process was first.

    Its rank, seed and rate are to be tried again.
    """
    with suppress(UpdateFinishedTrialError):
        study._storage.set_trial_user_attr(trial._trial_id, "killed", True)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def close_storage(storage: BaseStorage) -> None:
    """Release a database's connections, or a journal's lock that an interrupt left held."""
    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage):
        backend.remove_session()
        backend.engine.dispose()
    elif isinstance(backend, JournalFileBackend):
        cast(Any, backend._lock).release(force=True)


_QUIET = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna below warnings and restore its level afterwards. Safe in several threads at
    once.
    """
    logger = logging.getLogger("optuna")
    with _QUIET:
        before = logger.level
        logger.setLevel(max(before, logging.WARNING))
        try:
            yield
        finally:
            logger.setLevel(before)
