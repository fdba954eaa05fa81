"""Studies that others disturb: a worker that starts at every moment of another's start, workers that are stopped, and a
storage that is changed while a worker runs.

A race is not left to luck: the other worker runs, from its first to its last trial, before call n of the first worker's
storage, for every n until the first worker begins a trial.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from attacks.calls import forked, in_child
from attacks.outcomes import HANG_S, Attack, Outcomes, Refused
from attacks.victim import (
    SILENCE_S,
    TRIALS,
    calibration,
    finished,
    is_complete,
    prepare,
    storage_in,
    victims,
)
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages._cached_storage import _CachedStorage

import rankaware_optim as ra

JOURNAL, SQLITE = "", "sqlite:///{folder}/study.db"


# --- starts ---------------------------------------------------------------------------------------------------------


@contextmanager
def before_call(at: int, act: Callable[[], object]) -> Iterator[list[str]]:
    """Run `act` once, before call number `at` of an Optuna storage; yields the names of the calls."""
    names: list[str] = []

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            names.append(real.__name__)
            if len(names) == at:
                act()
            return real(*args, **kwargs)

        return called

    public = [name for name in vars(BaseStorage) if not name.startswith("_")]
    with ExitStack() as patches:
        for kind in (JournalStorage, _CachedStorage):
            own = {
                name: wrapped(vars(kind)[name])
                for name in public
                if callable(vars(kind).get(name))
            }
            patches.enter_context(patch.multiple(kind, **own))
        yield names


def run_starts(url: str) -> Any:
    def run(seed: int, count: int, folder: Path) -> Outcomes:
        prepare()
        outcomes = Outcomes()
        with before_call(0, print) as calls:
            calibration(storage_in(folder, url), name=f"start-{seed}")
        with victims() as other:
            for at in range(1, calls.index("create_new_trial") + 2):
                mine = folder / str(at)
                mine.mkdir()
                outcomes.attempt(
                    at,
                    partial(
                        raced,
                        other,
                        storage_in(mine, url),
                        mine,
                        f"race-{seed}-{at}",
                        at,
                    ),
                    limit=60,
                )
        return outcomes

    return run


def raced(other: Any, storage: Any, folder: Path, name: str, at: int) -> None:
    ran: list[float] = []
    with before_call(
        at,
        lambda: ran.append(other(storage=str(storage), folder=str(folder), name=name)),
    ):
        recipe = calibration(storage, name=name, pause=0.0)
    if not ran or len(recipe.tensors["lr"]) != TRIALS:
        raise AssertionError(f"{len(recipe.tensors['lr'])} trials of {TRIALS}")
    is_complete(storage, TRIALS, {}, name)


# --- stopped workers ------------------------------------------------------------------------------------------------


def run_stopped(url: str) -> Any:
    def run(seed: int, count: int, folder: Path) -> Outcomes:
        prepare()
        outcomes = Outcomes()
        calibration(storage_in(folder, url), name="straight")
        began = time.perf_counter()
        calibration(storage_in(folder, url), name="again")
        seconds = time.perf_counter() - began
        for where in ((0, 0), (0, 5), (2, 0), (3, 5), (TRIALS - 1, 0)):
            mine = folder / f"{where[0]}-{where[1]}"
            mine.mkdir()
            limit = 3 * seconds + 4 * SILENCE_S + HANG_S
            outcomes.attempt(
                where,
                partial(stopped, storage_in(mine, url), where, limit),
                limit=3 * limit,
            )
        return outcomes

    return run


def stopped(storage: Any, where: tuple[int, int], limit: float) -> None:
    """A worker is stopped in a run. Another ends the study, and what the first does when it goes on changes nothing."""
    child = forked(
        lambda: calibration(
            storage, at=where, act=lambda: os.kill(os.getpid(), signal.SIGSTOP)
        )
    )
    if not os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
        raise AssertionError("the worker was not stopped")
    try:
        in_child(lambda: calibration(storage, pause=0.0), (), limit)
        is_complete(storage, TRIALS, {})
        ended = finished(storage)
    finally:
        os.kill(child, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise AssertionError(f"the worker that was stopped ended with {code}")
    is_complete(storage, TRIALS, ended)


# --- a storage that is changed --------------------------------------------------------------------------------------


def gone(path: Path, copy: bytes) -> None:
    path.unlink()


def empty(path: Path, copy: bytes) -> None:
    path.write_bytes(b"")


def cut(path: Path, copy: bytes) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replaced_by_text(path: Path, copy: bytes) -> None:
    path.write_bytes(b"a,b\n" * 2000)


def restored(path: Path, copy: bytes) -> None:
    """An older state, written into the file."""
    path.write_bytes(copy)


def replaced_by_older(path: Path, copy: bytes) -> None:
    """An older state, as another file under the name."""
    other = path.with_name("restored")
    other.write_bytes(copy)
    other.replace(path)


def replaced_by_folder(path: Path, copy: bytes) -> None:
    path.unlink()
    path.mkdir()


CHANGES = (
    gone,
    empty,
    cut,
    replaced_by_text,
    restored,
    replaced_by_older,
    replaced_by_folder,
)


def run_changed(url: str) -> Any:
    def run(seed: int, count: int, folder: Path) -> Outcomes:
        prepare()
        outcomes = Outcomes()
        calibration(storage_in(folder, url), name="straight")
        for change in CHANGES:
            for where in ((0, 0), (2, 5)):
                mine = folder / f"{change.__name__}-{where[0]}"
                mine.mkdir()
                what = f"{change.__name__} in trial {where[0]}"
                outcomes.attempt(
                    what,
                    partial(changed, mine, url, change, where),
                    Refused,
                    limit=60.0,
                )
        return outcomes

    return run


def changed(
    folder: Path,
    url: str,
    change: Callable[[Path, bytes], None],
    where: tuple[int, int],
) -> None:
    storage, path = (
        storage_in(folder, url),
        folder / ("study.db" if url else "study.journal"),
    )
    calibration(storage, trials=1)  # what a copy holds
    shutil.copy(path, folder / "copy")
    copy = (folder / "copy").read_bytes()
    where = (where[0] + 1, where[1])
    in_child(
        lambda: calibration(storage, at=where, act=lambda: change(path, copy)),
        ra.CalibrationError,
        2 * HANG_S,
    )


ATTACKS = (
    Attack("starts at once, journal", 1, 1, run_starts(JOURNAL)),
    Attack("starts at once, SQLite", 1, 1, run_starts(SQLITE)),
    Attack("stopped workers, journal", 1, 1, run_stopped(JOURNAL)),
    Attack("stopped workers, SQLite", 1, 1, run_stopped(SQLITE)),
    Attack("storage changed, journal", 1, 1, run_changed(JOURNAL)),
    Attack("storage changed, SQLite", 1, 1, run_changed(SQLITE)),
    *(
        Attack("starts at once, PostgreSQL", 1, 1, run_starts(url))
        for url in filter(None, [os.environ.get("RANKAWARE_POSTGRESQL", "")])
    ),
)
