"""Runs kept on file: read, completed by what is missing, each appended as it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from study.domains import DomainError
from study.grids import Job, Losses, Wanting

VERSION = 1  # of the files of runs
Train = Callable[[Job], float | None]


def read(store: Path) -> dict[Job, float | None]:
    """Every run on file; a line cut short is left out, so that it is run again.

    Raises:
        DomainError: the file is of another version.
    """
    done: dict[Job, float | None] = {}
    for row in _rows(store):
        if row.get("version", VERSION) != VERSION:
            raise DomainError(f"{store} is of version {row['version']}, not {VERSION}.", "Move it aside.")
        if {*Job._fields, "loss"} <= row.keys():
            done[Job(*(row[name] for name in Job._fields))] = row["loss"]
    return done


def machines(store: Path) -> list[dict[str, Any]]:
    """Where the runs on file were made, as far as it was noted."""
    return [row["machine"] for row in _rows(store) if "machine" in row]


def _rows(store: Path) -> Iterator[dict[str, Any]]:
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def whole(store: Path, grid: Wanting, command: str) -> dict[Job, float | None]:
    """Every run on file, where the grid wants no more: what is published is not replaced by a part of it.

    Raises:
        DomainError: runs are missing, which `command` makes.
    """
    done = read(store)
    if missing := len(grid.wanted(done)):
        raise DomainError(
            f"{store} holds {len(done)} runs, and at least {missing} more are wanted. Nothing was written.",
            f"Make them first: {command}.",
        )
    return done


def rounded(done: Losses) -> list[list[Any]]:
    """Every run as [domain, scheme, rank, log2 rate, seed, loss], the loss None where it diverged."""
    return [[*job, loss if loss is None else round(loss, 5)] for job, loss in sorted(done.items())]


def complete(
    grid: Wanting,
    run: Train,
    store: Path,
    workers: int,
    say: Callable[[str], Any],
    machine: Mapping[str, Any] | None = None,
) -> None:
    """Run what the grid wants until it wants no more; every finished run is appended to `store` at once.

    machine: where, with what and from which commit, noted in the store before the runs that it made.

    Raises:
        DomainError: another process writes to the store, the disk is full, or the file is of another version.
    """
    with _held(store), _processes(workers) as pool:
        done = read(store)
        while jobs := grid.wanted(done):
            say(f"{store.stem}: {len(jobs)} runs to go, {len(done)} on file")
            if machine and machines(store)[-1:] != [machine]:
                _append(store, {"machine": machine})
            for job, loss in _results(run, jobs, pool):
                done[job] = loss
                _append(store, {**job._asdict(), "loss": loss if loss is None else round(loss, 6)})


@contextmanager
def _held(store: Path) -> Iterator[None]:
    """The store for this process alone, its first line naming the version."""
    store.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(store.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DomainError(f"Another process writes to {store}.", "Wait for it, or stop it.") from error
    try:
        if not store.exists():
            _append(store, {"version": VERSION})
        yield
    finally:
        lock.release()


def _append(store: Path, row: Mapping[str, Any]) -> None:
    """Append a row, on a line of its own where the last one was cut short."""
    try:
        with store.open("a") as file:
            file.write("\n" * _cut_short(store) + json.dumps(row) + "\n")
    except OSError as error:
        raise DomainError(f"{store} cannot be written: {error}.", "Make room; what it holds is kept.") from error


def _cut_short(store: Path) -> bool:
    with store.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes of one thread each, none for one worker; what an error leaves in the queue is not run."""
    torch.set_num_threads(1)
    if workers == 1:
        yield None
        return
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _results(run: Train, jobs: Sequence[Job], pool: ProcessPoolExecutor | None) -> Iterator[tuple[Job, float | None]]:
    """Results as they come."""
    if pool is None or len(jobs) == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    futures = {pool.submit(run, job): job for job in jobs}
    try:
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    except BrokenProcessPool as error:
        raise DomainError("A process was ended from outside, perhaps for its memory.", "Use --workers 1.") from error
