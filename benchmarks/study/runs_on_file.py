"""Runs kept on file: read them, and complete a grid by running what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from recording import made_with, written_by
from study.domains import DomainError
from study.grids import Job, Wanting

VERSION = 1  # of the files of runs
Train = Callable[[Job], float | None]


def read(store: Path) -> dict[Job, float | None]:
    """Every run on file, as {job: loss}. A truncated line is left out, so that its run is made again.

    Raises:
        DomainError: the file has another version.
    """
    done: dict[Job, float | None] = {}
    for row in _rows(store):
        if row.get("version", VERSION) != VERSION:
            raise DomainError(
                f"{store} has version {row['version']}, not {VERSION}.",
                "Move it aside.",
            )
        if {*Job._fields, "loss"} <= row.keys():
            done[Job(*(row[name] for name in Job._fields))] = row["loss"]
    return done


def machines(store: Path) -> list[dict[str, Any]]:
    """The machines that made the runs on file, as far as they were noted."""
    return [row["machine"] for row in _rows(store) if "machine" in row]


def made_by(on: Mapping[str, Any], *stores: Path) -> str:
    """The machines and networks of the runs on file, then what their page rests on and its command."""
    return f"{made_with(each for store in stores for each in machines(store))}\n\n{written_by(on)}"


def read_begun(
    folder: Path, tasks: Iterable[str]
) -> dict[str, dict[Job, float | None]]:
    """The runs of each task that has any, in a folder with a file a task."""
    runs = {task: read(folder / f"{task}.jsonl") for task in tasks}
    return {task: done for task, done in runs.items() if done}


def _rows(store: Path) -> Iterator[dict[str, Any]]:
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def complete(
    grid: Wanting,
    run: Train,
    store: Path,
    workers: int,
    say: Callable[[str], Any],
    machine: Mapping[str, Any] | None = None,
) -> None:
    """Run the jobs that the grid wants until it wants no more. Append each run to `store` as soon as it ends.

    Args:
        grid: what decides which runs are missing.
        run: trains a job and returns its held-out loss, None if it diverged.
        store: the file of runs.
        workers: processes of one thread each.
        say: is called with a line on the progress.
        machine: machine, versions and commit, written to the store before the runs that were made with them.

    Raises:
        DomainError: another process writes to the store, the disk is full, or the file has another version.
    """
    with _held(store), _processes(workers) as pool:
        done = read(store)
        while jobs := grid.wanted(done):
            say(f"{store.stem}: {len(jobs)} runs to go, {len(done)} on file")
            if machine and machines(store)[-1:] != [machine]:
                _append(store, {"machine": machine})
            for job, loss in _results(run, jobs, pool):
                done[job] = loss
                _append(
                    store,
                    {**job._asdict(), "loss": loss if loss is None else round(loss, 6)},
                )


@contextmanager
def _held(store: Path) -> Iterator[None]:
    """Lock the store for this process. A new store gets a first line with the version."""
    store.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(store.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DomainError(
            f"Another process writes to {store}.", "Wait for it, or stop it."
        ) from error
    try:
        if not store.exists():
            _append(store, {"version": VERSION})
        yield
    finally:
        lock.release()


def _append(store: Path, row: Mapping[str, Any]) -> None:
    """Append a row. If the last line is truncated, start a new line first."""
    try:
        with store.open("a") as file:
            file.write("\n" * _cut_short(store) + json.dumps(row) + "\n")
    except OSError as error:
        raise DomainError(
            f"{store} cannot be written: {error}.", "Make room; what it holds is kept."
        ) from error


def _cut_short(store: Path) -> bool:
    with store.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of processes of one thread each; None for one worker. After an error, queued jobs are not run."""
    torch.set_num_threads(1)
    if workers == 1:
        yield None
        return
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _results(
    run: Train, jobs: Sequence[Job], pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Job, float | None]]:
    """Yield (job, loss) as runs end."""
    if pool is None or len(jobs) == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    futures = {pool.submit(run, job): job for job in jobs}
    try:
        yield from (
            (futures[future], future.result()) for future in as_completed(futures)
        )
    except BrokenProcessPool as error:
        raise DomainError(
            "A process was ended from outside, perhaps for its memory.",
            "Use --workers 1.",
        ) from error
