"""Sweeps of longer runs: 25 to 800 steps, at two ranks with alpha = rank, at Init[B], and in full finetuning.

    python benchmarks/study/longer.py --domain language    # resumable: results/longer/language.jsonl

Six tasks. Each length has its own warm-up of 5 % and its own decay. Four arms: Init[A] with alpha = rank at ranks 16 and
128, Init[B] with alpha = rank at rank 64, and full finetuning. Rates are an octave apart, on two seeds (one from 800
steps on). A grid starts around the best rate of the length before it, and grows at an edge. Time series
goes on to 1,600 and 3,200 steps, but at Init[B]. `frontier/page.py` reads the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import click
import torch
from recording import RESULTS
from study.configurations import START, run_in, starts
from study.domains import HELD_OUT, Domain, get_domain
from study.grids import FULL, Cell, Job, Line, Losses, Together
from study.runs_on_file import complete, read_begun
from study.suite import UNKNOWN, provenance, study_rates

RESTS_ON = ()
STORE = RESULTS / "longer"
TASKS = (
    "image_generation",
    "vision_language",
    "super_resolution",
    "language",
    *HELD_OUT,
)
LENGTHS = (25, 50, 100, 200, 400, 800)
LONGEST = 800  # steps, from which on one seed is run
FURTHER, FURTHER_TASK = (1600, 3200), "time_series"
MARK = " | "


AT_A = "Init[A], s = 1"
# configurations and ranks
ARMS = ((AT_A, 16), (AT_A, 128), ("Init[B], s = 1", 64), ("full", FULL))


def cell_of(task: str, config: str, rank: int, steps: int) -> Cell:
    """The runs of a length at a configuration's rank."""
    return task, f"{config}{MARK}{steps} steps", rank


@click.command()
@click.option("--domain", "task", type=click.Choice(TASKS), required=True)
@click.option("--workers", default=2, show_default=True)
def main(task: str, workers: int) -> None:
    """Run what is missing of a task's grids."""
    torch.set_num_threads(1)
    chains = [chain(task, *arm) for arm in ARMS]
    grid = Together([starts(task, range(2)), *chains])
    store = STORE / f"{task}.jsonl"
    complete(grid, run_one, store, workers, click.echo, provenance(task))


@dataclass(frozen=True)
class Chain:
    """The grids of an arm by rising length, each around the best rate of the length before it."""

    cells: Sequence[Cell]
    guess: int

    def wanted(self, done: Losses) -> list[Job]:
        centre = self.guess
        for cell in self.cells:
            line = Line(cell, centre, 1 if steps_of(cell[1]) >= LONGEST else 2)
            if missing := line.wanted(done):
                return missing
            centre = line.best(done)
        return []


def chain(task: str, config: str, rank: int) -> Chain:
    """The chain of an arm, from the study's best rate at the nearest rank."""
    rates = study_rates(task, config)
    nearest = min(rates, key=lambda other: abs(other - rank), default=None)
    guess = UNKNOWN if nearest is None else round(rates[nearest])
    goes_on = task == FURTHER_TASK and config != "Init[B], s = 1"
    lengths = (*LENGTHS, *(FURTHER if goes_on else ()))
    return Chain([cell_of(task, config, rank, steps) for steps in lengths], guess)


def steps_of(scheme: str) -> int:
    return int(scheme.partition(MARK)[2].removesuffix(" steps"))


def run_one(job: Job) -> float | None:
    """The held-out loss of a run; None where it diverged."""
    domain = get_domain(job.domain)
    if job.scheme == START:
        return run_in(domain, job)
    plain = job._replace(scheme=job.scheme.partition(MARK)[0])
    return run_in(of_length(domain, steps_of(job.scheme)), plain)


def of_length(domain: Domain, steps: int) -> Domain:
    return replace(domain, steps=steps)


def runs_of_length(done: Losses, steps: int) -> dict[Job, float | None]:
    """The runs of a length under their configurations' names, and the losses before training."""
    kept = {}
    for job, loss in done.items():
        config, mark, _ = job.scheme.partition(MARK)
        if not mark or steps_of(job.scheme) == steps:
            kept[job._replace(scheme=config)] = loss
    return kept


def on_file() -> dict[str, dict[Job, float | None]]:
    """The runs of each task that has any."""
    return read_begun(STORE, TASKS)


if __name__ == "__main__":
    main()
