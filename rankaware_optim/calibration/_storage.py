"""Storage of a study, and its workers' signs of life: a journal file by default, or any Optuna
storage by URL.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import optuna
from filelock import FileLock
from msgspec import ValidationError
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import Trial, TrialState, create_trial
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from ..errors import CalibrationError
from ._constants import ATTEMPTS, BEAT_S, JOIN_S, LOCK_S, MISSED

try:
    import fcntl
except ImportError:  # Windows, whose file systems have locks
    fcntl = None  # type: ignore[assignment]

_OPERATION = b'{"op_code":'  # the beginning of every line of a journal
# of a storage that was open; KeyError where a trial or study is gone
_FAILURES = (
    OSError,
    StorageInternalError,
    SQLAlchemyError,
    ValidationError,
    KeyError,
    json.JSONDecodeError,
)


def open_storage(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    """Open an Optuna storage.

    Args:
        storage: a storage, which is returned unchanged, a URL, the path of a journal file, or None
            for memory.

    Raises:
        CalibrationError: the storage cannot be reached or read, or is a file of something else.
    """
    if storage is None or isinstance(storage, BaseStorage):
        return get_storage(storage)
    with storage_errors(storage, (Exception,)):
        if isinstance(storage, str) and "://" in storage:
            return _database(storage)
        return _journal(Path(os.path.realpath(storage)))


def _database(url: str) -> BaseStorage:
    """Open the database at a URL. Try again if another process creates its tables meanwhile."""
    for _ in range(ATTEMPTS):
        try:
            return get_storage(url)
        except DBAPIError as error:
            text = str(error)
            if not isinstance(error, IntegrityError) and "already exists" not in text:
                raise
        time.sleep(0.05)
    return get_storage(url)


# --- journals -------------------------------------------------------------------------------------


def _journal(path: Path) -> BaseStorage:
    """Open a journal file. Its lock belongs to the real path, whatever link leads there."""
    lock = Path(f"{path}.rankaware.lock")  # not PATH.lock, which may be poetry's
    if _is_other_file(path):
        _refuse_file(path, path)
    if _is_other_lock(lock):
        _refuse_file(path, lock)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_locks(lock)
    # Optuna's own lock is a file that a killed process leaves behind for 30 s. FileLock asks the
    # kernel, which frees the lock as soon as its holder is dead.
    held: Any = FileLock(lock, timeout=LOCK_S)
    return JournalStorage(_JournalFile(str(path), lock_obj=held))


def _is_other_file(path: Path) -> bool:
    """Return whether something is at a path that is no journal and no empty file."""
    if not path.exists():
        return False
    if (
        not path.is_file()
    ):  # a folder, a device, or a pipe, from which reading would never end
        return True
    with path.open("rb") as file:
        head = file.read(len(_OPERATION))
    return head not in (b"", _OPERATION)


def _is_other_lock(lock: Path) -> bool:
    """Return whether a lock file has content, which FileLock would erase."""
    return lock.exists() and lock.stat().st_size > 0


def _refuse_file(path: Path, other: Path) -> NoReturn:
    raise CalibrationError(
        f"storage={str(path)!r} cannot be used: {str(other)!r} exists but does not belong to a"
        " study. It was left unchanged.",
        "Name a new file, the journal of a study, or a database by its URL, such as"
        " 'sqlite:///study.db'.",
    )


def _check_locks(lock: Path) -> None:
    """Raise the system's error if files cannot be locked here, as on some network mounts.

    FileLock would then use the mere existence of the file as the lock, which outlives a kill.
    """
    if fcntl is None:
        return
    with lock.open("ab") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _JournalFile(JournalFileBackend):
    """A journal's file, whose last line may have been cut short by a full disk or a power failure.
    Optuna reads past such a line, but what it appends would become a part of it.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lock: Any = self._lock
        with lock, open(self._file_path, "r+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)


# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def storage_errors(
    storage: Any, failures: tuple[type[Exception], ...] = _FAILURES
) -> Iterator[None]:
    """Turn a storage's failures into a `CalibrationError`."""
    try:
        yield
    except CalibrationError:
        raise
    except failures as error:
        is_named = isinstance(storage, (str, os.PathLike))
        place = str(storage) if is_named else type(storage).__name__
        raise CalibrationError(
            f"The study's storage {_failure(error, place)}",
            "Check that it is there, can be written, and is not locked by a process that was"
            " stopped. If it was changed or damaged, restore it from a copy or name a new one. Then"
            " the same call continues where it stopped.",
        ) from error


def _failure(error: BaseException, place: str) -> str:
    """Return what failed, and the first line of the root error, since sqlalchemy wraps a driver's
    in paragraphs. A URL is shown without its user, password and query.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".")
    scheme, mark, rest = place.partition("://")
    user, _, host = rest.rpartition("@")
    # after an unescaped @ the rest of a password is part of the host
    for part in filter(None, re.split("[@:/?]", user.partition(":")[2])):
        line = line.replace(part, "…")
    return f"{scheme}{mark}{host.partition('?')[0]} failed: {line}."


# --- a worker's life ------------------------------------------------------------------------------
# A worker writes heartbeats into its running trial, and fails the trials whose heartbeats have
# stopped. A trial whose process was killed stays RUNNING in Optuna's storage, and that of a stopped
# process goes on when it is woken. Only the storage is asked who lives, so that one rule holds for
# every host, system and storage.


class Heartbeat(threading.Thread):
    """A worker's signs of life, and its look at those of others. In a thread, since a step may take
    long.

    Silence is counted in looks, and not by a clock: a storage or a machine that stood still proves
    nothing.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.trial: Trial | None = None  # that this worker runs
        self._study = study
        # by trial of others: the last heartbeat, and looks without a new one
        self._seen: dict[int, tuple[object, int]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        for beat in count(1):
            # where the storage fails, other reads and writes raise
            with suppress(Exception):
                self.look()
            if self._ended.wait(BEAT_S):
                return
            with suppress(Exception):  # also where another worker has failed the trial
                if self.trial is not None:
                    self.trial.set_user_attr("heartbeat", beat)

    def look(self) -> None:
        """Fail the trials of other workers that have been silent for too long."""
        own = self.trial
        for trial in self._study.get_trials(False, (TrialState.RUNNING,)):
            if own is not None and trial.number == own.number:
                continue
            beat = trial.user_attrs.get("heartbeat")
            last, missed = self._seen.get(trial.number, (self, 0))
            missed = missed + 1 if beat == last else 0
            self._seen[trial.number] = beat, missed
            if missed >= MISSED:
                with suppress(UpdateFinishedTrialError):  # another worker was first
                    self._study.tell(
                        trial.number, state=TrialState.FAIL, skip_if_finished=True
                    )

    def stop(self) -> None:
        """Stop after the current write."""
        self._ended.set()
        if self.is_alive():
            self.join(JOIN_S)


@contextmanager
def held_back(most: float = 1) -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the context, unless an interruption is being
    raised then.

    most: so many are held back. By default a second one raises at once, since the code inside may
        wait for another process.

    It works in the main thread, for a signal that has a Python handler.
    """
    before: dict[int, Any] = {}
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)
        if len(held) > most:
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for known in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(known)):
                before[known] = signal.signal(known, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            before[held[0]](held[0], None)


# --- private names of Optuna ----------------------------------------------------------------------
# All that this package uses, where the public API is not enough. A running trial must have its
# setting from its creation, since other processes read it at any time, and `Study.ask` sets
# attributes later. Database connections and journal locks are released, which Optuna's wrappers
# hide. tests/calibration/test_optuna.py fails if one of these names changes.


def begin_trial(
    study: Study,
    attributes: Mapping[str, Any],
) -> Trial:
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
