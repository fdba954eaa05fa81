"""This module opens the storage of an Optuna study: a journal file, a database or
another Optuna storage. The module also detects when a worker process of a calibration
has died.
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
from typing import Any, cast

import optuna
from filelock import FileLock, Timeout
from msgspec import ValidationError
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import Trial, TrialState, create_trial
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from .._checks import shown
from ..errors import CalibrationError
from ._constants import ATTEMPTS, BEAT_S, JOIN_S, LOCK_S, MISSED

try:
    import fcntl
except ImportError:  # Windows, whose file systems have locks
    fcntl = None  # type: ignore[assignment]

_OPERATION = b'{"op_code":'  # the beginning of every line of a journal
# Failures of a storage after it was opened. A KeyError means that a trial or the study is gone.
_FAILURES = (
    OSError,
    StorageInternalError,
    SQLAlchemyError,
    ValidationError,
    KeyError,
    json.JSONDecodeError,
)


StorageLike = str | os.PathLike[str] | BaseStorage | None  # `storage=` of `calibrate`


def open_storage(storage: StorageLike) -> BaseStorage:
    """Open an Optuna storage.

    Args:
        storage: a URL, the path of a journal file, or None for memory. An Optuna storage is
            returned unchanged.

    Raises:
        CalibrationError: the storage cannot be reached or read, or the file is not a
            journal.
    """
    if storage is None or isinstance(storage, BaseStorage):
        return get_storage(storage)
    if not isinstance(storage, (str, os.PathLike)):
        raise CalibrationError(
            f"storage={shown(storage)} is not a path, a URL or an Optuna storage.",
            "Pass the path of a file, for example storage='study.journal', or the URL of a"
            " database, for example storage='sqlite:///study.db'.",
        )
    with storage_errors(storage, (Exception,)):
        if isinstance(storage, str) and "://" in storage:
            return _database(storage)
        return _journal(Path(os.path.realpath(storage)))


def _database(url: str) -> BaseStorage:
    """Open the database at a URL, and retry while a different process creates its tables."""
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
    """Open an Optuna journal file and check that the file can be locked."""
    lock = Path(f"{path}.rankaware.lock")  # not PATH.lock, which may be poetry's
    if _is_other_file(path):
        raise CalibrationError(
            f"storage={str(path)!r} exists, but it is not the journal of a study. It was left"
            " unchanged.",
            "Choose a path that does not exist yet, or the journal of an existing study.",
        )
    if _is_other_lock(lock):
        raise CalibrationError(
            f"storage={str(path)!r} cannot be used, because its lock file {str(lock)!r} exists and"
            " is not empty. The lock file was left unchanged.",
            "Choose a different path as storage=, or move the lock file away.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_locks(lock)
    # Optuna's own lock is a file that a killed process leaves behind for 30 s. FileLock asks the
    # kernel, which frees the lock as soon as its holder is dead.
    held: Any = FileLock(lock, timeout=LOCK_S)
    return JournalStorage(_JournalFile(str(path), lock_obj=held))


def _is_other_file(path: Path) -> bool:
    """Return whether a path exists but is neither an Optuna journal nor an empty
    file.
    """
    if not path.exists():
        return False
    # a folder, a device, or a pipe, from which reading would never end
    if not path.is_file():
        return True
    with path.open("rb") as file:
        head = file.read(len(_OPERATION))
    return head not in (b"", _OPERATION)


def _is_other_lock(lock: Path) -> bool:
    """Return whether a lock file has content, which the class FileLock would erase."""
    return lock.exists() and lock.stat().st_size > 0


def _check_locks(lock: Path) -> None:
    """Raise an OSError if files cannot be locked, for example on some network file systems.

    If files cannot be locked, FileLock treats the existence of the lock file as the
    lock, so a killed process would leave the study locked.
    """
    if fcntl is None:
        return
    with lock.open("ab") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _JournalFile(JournalFileBackend):
    """An Optuna journal file that removes an incomplete last line before it adds new lines.

    A full disk or a power failure can leave the last line of a journal incomplete.
    Optuna ignores an incomplete line when it reads the file. When Optuna writes to the
    journal, however, it would append the next entry to the incomplete line, so that the
    next entry would be lost as well.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lock: Any = self._lock
        # the lock is reentrant, so that the base class may take it again
        with lock, open(self._file_path, "r+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)


# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def storage_errors(
    storage: StorageLike, failures: tuple[type[Exception], ...] = _FAILURES
) -> Iterator[None]:
    """Convert errors of an Optuna storage to a `CalibrationError` that names the
    storage.
    """
    try:
        yield
    except CalibrationError:
        raise
    except failures as error:
        is_named = isinstance(storage, (str, os.PathLike))
        place = str(storage) if is_named else type(storage).__name__
        name, reason = _failure(error, place)
        if isinstance(error, Timeout):
            raise CalibrationError(
                f"The study's storage {name} is locked by another process, which did not release"
                f" it within {LOCK_S:g} seconds.",
                "End or continue this process, which is probably suspended. Then repeat the same"
                " call to continue the search.",
            ) from error
        raise CalibrationError(
            f"The study's storage {name} failed: {reason}.",
            "Check that the storage exists and that you may write to it. If it is damaged, restore"
            " it from a copy or choose a new storage=. Then repeat the same call to continue the"
            " search.",
        ) from error


def _failure(error: BaseException, place: str) -> tuple[str, str]:
    """Return the name of the storage and the first line of the error that the storage
    raised.

    If the name of the storage is a URL, the user name, the password and the query are
    removed from it.
    """
    # SQLAlchemy wraps the short error of a database driver in several paragraphs
    while error.__cause__ is not None:
        error = error.__cause__
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".")
    scheme, mark, rest = place.partition("://")
    user, _, host = rest.rpartition("@")
    # after an unescaped @ the rest of a password is part of the host
    for part in filter(None, re.split("[@:/?]", user.partition(":")[2])):
        line = line.replace(part, "…")
    return f"{scheme}{mark}{host.partition('?')[0]}", line


# --- which workers are alive ----------------------------------------------------------------------
# If a process is killed, its trial stays RUNNING in Optuna's storage forever. The process may have
# run on a different machine, so other workers cannot check it directly. Instead, every worker
# shows through the storage that it is alive, and watches the other workers there. The same rule
# works for every machine, operating system and storage:
#   - While it has a trial, a worker counts up the trial's attribute "heartbeat", every 10 seconds.
#   - Every 10 seconds, a worker also polls all running trials. If it sees the same heartbeat of a
#     trial again in four polls in a row, the trial's worker counts as dead, and the trial is marked
#     FAIL. The rank and seed of the trial are then tried again.
#   - Two workers may mark the same trial at the same time. The second worker gets an
#     UpdateFinishedTrialError, and ignores it.
#   - A worker that was only suspended may wake up after its trial was marked. Its next write raises
#     the same error, and it drops the trial (`TrialRunner.run`).
# Polls, not seconds: if the machine or the storage was suspended for an hour, then every worker's
# heartbeat is an hour old, but none was polled meanwhile. Elapsed time proves nothing.


class Heartbeat(threading.Thread):
    """Writes heartbeats for this worker's trial, and marks trials of dead workers as failed.

    Heartbeats need a separate thread, because a training step may take longer than the
    time between two heartbeats. Only the heartbeat thread writes the attribute
    "heartbeat" of an Optuna trial. The main thread sets `trial` to a new trial after
    the trial was stored, and to None after the end of the trial was stored. For a short
    time, the heartbeat thread may still use the previous trial, which is harmless. An
    additional heartbeat changes nothing, and a heartbeat of a finished trial raises an
    error that is ignored.

    Attributes:
        trial: the trial that this worker runs, or None.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.trial: Trial | None = None
        self._study = study
        # by trial of another worker: its last heartbeat, and the polls since that found no new one
        self._last: dict[int, tuple[object, int]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        for beat in count(1):
            # if the storage fails, the main thread gets the error from its own reads and writes
            with suppress(Exception):
                self.poll()
            if self._ended.wait(BEAT_S):
                return
            with suppress(Exception):  # another worker may have declared the trial dead
                if self.trial is not None:
                    self.trial.set_user_attr("heartbeat", beat)

    def poll(self) -> None:
        """Check the heartbeats of other workers, and mark trials of dead workers as failed."""
        own = self.trial
        for trial in self._study.get_trials(False, (TrialState.RUNNING,)):
            if own is not None and trial.number == own.number:
                continue
            beat = trial.user_attrs.get("heartbeat")
            last, missed = self._last.get(trial.number, (self, 0))
            missed = missed + 1 if beat == last else 0
            self._last[trial.number] = beat, missed
            if missed >= MISSED:
                with suppress(UpdateFinishedTrialError):  # another worker was faster
                    self._study.tell(
                        trial.number, state=TrialState.FAIL, skip_if_finished=True
                    )

    def stop(self) -> None:
        """Stop the heartbeat thread after it has finished its current write to the
        storage.
        """
        self._ended.set()
        if self.is_alive():
            self.join(JOIN_S)


@contextmanager
def held_back(most: float = 1) -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the context.

    A delayed Ctrl-C or SIGTERM is dropped if a KeyboardInterrupt is already being
    raised. Ctrl-C and SIGTERM are delayed only in the main thread, and only if they
    have a Python handler.

    Args:
        most: the number of signals to delay. By default a second signal takes effect
            immediately, because the code in the context may be waiting for a different
            process.
    """
    # The original handler of each signal. It is restored at the end, and then receives a
    # signal that was delayed.
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
# These are all the private names that this package uses, because the public ones are not enough:
# `Study.ask` creates a trial first and sets its attributes later, but other workers may read the
# trial in between, and must find its setting. And Optuna's wrappers hide the database connections
# and the journal's lock, which must be released at the end. tests/calibration/test_optuna.py fails
# if one of these names changes.


def begin_trial(
    study: Study,
    attributes: Mapping[str, object],
) -> Trial:
    """Create a running Optuna trial and store its user attributes, both in a single
    write to the storage.
    """
    template = create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
    return Trial(study, study._storage.create_new_trial(study._study_id, template))


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a database, or release the lock of a journal file."""
    # an interrupt may have left the journal locked
    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage):
        backend.remove_session()
        backend.engine.dispose()
    elif isinstance(backend, JournalFileBackend):
        cast(Any, backend._lock).release(force=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Optuna's log messages below the level of warnings inside the context."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
