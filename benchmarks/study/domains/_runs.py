"""Runs of a domain: one training run, and a grid of them, kept on file, centred and extended by what it finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from filelock import FileLock, Timeout
from torch import nn

from . import Domain, DomainError, mean_loss

WARMUP, FINAL = 0.05, 0.1  # shares of the steps and of the rate
FULL = 0  # stands for full finetuning in a rank's place
VERSION = 1  # of the files of runs


class Job(NamedTuple):
    """A run: the scheme (optimizer, law or configuration), the rank, log2 of the base rate, the seed."""

    domain: str
    scheme: str
    rank: int
    x: float
    seed: int


class Wanting(Protocol):
    """What knows which runs are missing."""

    def wanted(self, done: Losses) -> list[Job]: ...


Losses = Mapping[Job, float | None]  # held-out, None where the run diverged
Run = Callable[[Job], float | None]
Cell = tuple[str, str, int]  # domain, scheme, rank


def shape(step: int, steps: int, warmup: float = WARMUP) -> float:
    """Share of the rate at a step: a linear warm-up over a share of the steps, then a cosine to a tenth."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def train(
    domain: Domain, model: nn.Module, opt: Any, seed: int, clip: float = math.inf, warmup: float = WARMUP
) -> float | None:
    """The held-out loss after the domain's steps, None where it diverged. A schedule-free optimizer warms up itself."""
    free = hasattr(opt, "train")
    shares = partial(shape, steps=domain.steps, warmup=warmup)
    schedule = None if free else torch.optim.lr_scheduler.LambdaLR(opt, shares)
    if free:
        opt.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for batch in islice(domain.batches(seed), domain.steps):
        opt.zero_grad()
        loss = domain.loss(model, batch)
        if not math.isfinite(loss.item()):
            return None
        loss.backward()
        if clip < math.inf:
            nn.utils.clip_grad_norm_(trained, clip)
        opt.step()
        if schedule is not None:
            schedule.step()
    if free:
        opt.eval()
    after = domain.evaluate(model)
    return after if math.isfinite(after) else None


@dataclass(frozen=True)
class Listed:
    """Runs known beforehand."""

    jobs: Sequence[Job]

    def wanted(self, done: Losses) -> list[Job]:
        return [job for job in self.jobs if job not in done]


@dataclass(frozen=True)
class Grid:
    """Octaves of rate to try: a coarse pass of one seed places the centre, `half` octaves go to either side of it.

    coarse: log2 rates by scheme. placed_by: the cell whose coarse pass places another's grid. A grid whose best mean
    lies at its edge grows there by an octave, up to `most` times.
    """

    cells: Sequence[Cell]
    coarse: Mapping[str, Sequence[int]]
    placed_by: Callable[[Cell], Cell]
    seeds: int = 3
    half: int = 3
    most: int = 6

    def wanted(self, done: Losses) -> list[Job]:
        """The runs still missing, as far as those done tell."""
        first = [Job(*c, x, 0) for c in dict.fromkeys(map(self.placed_by, self.cells)) for x in self.coarse[c[1]]]
        for stage in (lambda: first, lambda: self._all(self._fine, done), lambda: self._all(self._moved, done)):
            if missing := [job for job in stage() if job not in done]:
                return missing
        return []

    def _all(self, of: Callable[[Cell, Losses], list[Job]], done: Losses) -> list[Job]:
        return [job for cell in self.cells for job in of(cell, done)]

    def _moved(self, cell: Cell, done: Losses) -> list[Job]:
        """The best rate of the cell that placed this one's grid, tried here too."""
        means = curve(done, self.placed_by(cell), self.seeds)
        x = min(means, key=lambda at: means[at])
        return [Job(*cell, x, seed) for seed in range(self.seeds)]

    def _fine(self, cell: Cell, done: Losses) -> list[Job]:
        by = self.placed_by(cell)
        centre = min(self.coarse[cell[1]], key=lambda x: or_inf(done[Job(*by, x, 0)]))
        low, high = centre - self.half, centre + self.half
        for _ in range(self.most + 1):
            jobs = [Job(*cell, x, seed) for x in range(low, high + 1) for seed in range(self.seeds)]
            if any(job not in done for job in jobs):
                return jobs
            best = min(means := curve(done, cell, self.seeds), key=lambda x: means[x])
            low, high = low - (best <= low), high + (best >= high)
        return jobs


def curve(done: Losses, cell: Cell, seeds: int) -> dict[float, float]:
    """{log2 rate: mean loss over the seeds} where all seeds were run, by rising rate; infinite where one diverged."""
    xs = sorted({job.x for job in done if job[:3] == cell})
    every = {x: [Job(*cell, x, seed) for seed in range(seeds)] for x in xs}
    return {x: mean_loss([done[job] for job in jobs]) for x, jobs in every.items() if all(job in done for job in jobs)}


def or_inf(loss: float | None) -> float:
    """A loss as a number: infinite where the run diverged."""
    return math.inf if loss is None else loss


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
    return map(_parsed, store.read_text().splitlines() if store.exists() else ())


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def complete(
    grid: Wanting,
    run: Callable[[Job], float | None],
    store: Path,
    workers: int,
    say: Callable[[str], Any],
    machine: Mapping[str, Any] | None = None,
) -> None:
    """Run what the grid wants until it wants no more; every finished run is appended to `store` at once.

    machine: noted in the store before its first run there.

    Raises:
        DomainError: another process writes to the store, the disk is full, or the file is of another version.
    """
    with _held(store), _processes(workers) as pool:
        done = read(store)
        while jobs := grid.wanted(done):
            say(f"{store.stem}: {len(jobs)} runs to go, {len(done)} on file")
            if machine and machine not in machines(store):
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
    try:
        with store.open("a") as file:
            file.write("\n" * _cut_short(store) + json.dumps(row) + "\n")
    except OSError as error:
        raise DomainError(f"{store} cannot be written: {error}.", "Make room; what it holds is kept.") from error


def _cut_short(store: Path) -> bool:
    """Whether the file's last line lacks its end."""
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


def _results(run: Run, jobs: Sequence[Job], pool: ProcessPoolExecutor | None) -> Iterator[tuple[Job, float | None]]:
    """Results as they come."""
    if pool is None or len(jobs) == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    futures = {pool.submit(run, job): job for job in jobs}
    try:
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    except BrokenProcessPool as error:
        raise DomainError("A process was ended from outside, perhaps for its memory.", "Use --workers 1.") from error
