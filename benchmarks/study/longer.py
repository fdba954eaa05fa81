"""Sweeps of longer runs: 25 to 800 steps, at two ranks with alpha = rank, at Init[B], and in full finetuning.

    python benchmarks/study/longer.py --domain language    # resumable: results/longer/language.jsonl
    python benchmarks/study/longer.py --batches            # resumable: results/longer/batches.jsonl

Six tasks. Each length has its own warm-up of 5 % and its own decay. Four arms: Init[A] with alpha = rank at ranks 16 and
128, Init[B] with alpha = rank at rank 64, and full finetuning. Rates are an octave apart, on two seeds (one at 800
steps). A grid starts around the best rate of the length before it, and grows at an edge. Time series and
audio go on to 1,600 and 3,200 steps, but at Init[B]. Another sweep has batches of 64, 16 and 4 of time series, at 100 steps
(its own) and 800, on two seeds. `frontier/page.py` and `study/lengths.py` read the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import click
import torch
from recording import RESULTS
from study.configurations import START, run_in, starts
from study.domains import HELD_OUT, Domain, get_domain
from study.grids import FULL, Cell, Job, Line, Listed, Losses, Together
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
LONGEST = 800  # steps, at which one seed is run
FURTHER, FURTHER_TASKS = (1600, 3200), ("time_series", "audio")
BATCHED, BATCHES, BATCH_LENGTHS = "time_series", (64, 16, 4), (100, 800)
# log2 of rates that were moved to rank 128 and 3,200 steps of time series: of 800 and 400 steps, and of rank 16. A
# spline knows nothing between the best rate there and the next, at which a seed blows up
ON_CLIFF = (-7.97, -7.64, -7.35)
MARK = " | "


AT_A = "Init[A], s = 1"
# configurations and ranks
ARMS = ((AT_A, 16), (AT_A, 128), ("Init[B], s = 1", 64), ("full", FULL))
FURTHER_ARMS = (ARMS[0], ARMS[1], ARMS[3])


def cell_of(task: str, config: str, rank: int, steps: int) -> Cell:
    """The runs of a length at a configuration's rank."""
    return task, f"{config}{MARK}{steps} steps", rank


@click.command()
@click.option("--domain", "task", type=click.Choice(TASKS), default=BATCHED)
@click.option("--batches", is_flag=True)
@click.option("--workers", default=2, show_default=True)
def main(task: str, batches: bool, workers: int) -> None:
    """Run what is missing of a task's grids, or of the batches."""
    torch.set_num_threads(1)
    name, run, grids = task, run_one, [starts(task, range(2))]
    if batches:
        name, run = "batches", run_batch
        grids += [
            of_batches(*arm, steps) for arm in FURTHER_ARMS for steps in BATCH_LENGTHS
        ]
    else:
        grids += [chain(task, *arm) for arm in ARMS]
        if task == BATCHED:
            cell = cell_of(task, AT_A, 128, 3200)
            on_cliff = [Job(*cell, x, seed) for x in ON_CLIFF for seed in range(2)]
            grids.append(Listed(on_cliff))
    store = STORE / f"{name}.jsonl"
    complete(Together(grids), run, store, workers, click.echo, provenance(task))


@dataclass(frozen=True)
class Chain:
    """The grids of an arm by rising length, each around the best rate of the length before it."""

    cells: Sequence[Cell]
    guess: int

    def wanted(self, done: Losses) -> list[Job]:
        centre = self.guess
        for cell in self.cells:
            line = Line(cell, centre, seeds_of(cell[1]))
            if missing := line.wanted(done):
                return missing
            centre = line.best(done)
        return []


def chain(task: str, config: str, rank: int) -> Chain:
    """The chain of an arm, from the study's best rate at the nearest rank."""
    rates = study_rates(task, config)
    nearest = min(rates, key=lambda other: abs(other - rank), default=None)
    guess = UNKNOWN if nearest is None else round(rates[nearest])
    goes_on = task in FURTHER_TASKS and config != "Init[B], s = 1"
    lengths = (*LENGTHS, *(FURTHER if goes_on else ()))
    return Chain([cell_of(task, config, rank, steps) for steps in lengths], guess)


def of_batches(config: str, rank: int, steps: int) -> Chain:
    """The chain of an arm by falling batch, from the study's best rate at the nearest rank."""
    cells = [batch_cell(config, rank, batch, steps) for batch in BATCHES]
    return Chain(cells, chain(BATCHED, config, rank).guess)


def batch_cell(config: str, rank: int, batch: int, steps: int) -> Cell:
    return BATCHED, f"{config}{MARK}batch {batch}{MARK}{steps} steps", rank


def seeds_of(scheme: str) -> int:
    """Seeds of a length, or of a batch."""
    return 1 if "batch" not in scheme and steps_of(scheme) == LONGEST else 2


def steps_of(scheme: str) -> int:
    return int(scheme.rpartition(MARK)[2].removesuffix(" steps"))


def run_one(job: Job) -> float | None:
    """The held-out loss of a run; None where it diverged."""
    domain = get_domain(job.domain)
    if job.scheme == START:
        return run_in(domain, job)
    plain = job._replace(scheme=job.scheme.partition(MARK)[0])
    return run_in(of_length(domain, steps_of(job.scheme)), plain)


def run_batch(job: Job) -> float | None:
    """The same at another batch."""
    if job.scheme == START:
        return run_one(job)
    config, batch, _ = job.scheme.split(MARK)
    domain = of_length(get_domain(job.domain), steps_of(job.scheme))
    domain = replace(domain, batch=int(batch.removeprefix("batch ")))
    return run_in(domain, job._replace(scheme=config))


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
