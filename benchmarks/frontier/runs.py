"""Real runs of optimizers that find their own rate, on the seeds of the study's sweeps.

    python benchmarks/frontier/runs.py --domain language    # resumable: results/frontier/language.jsonl

Five tasks. At a task's own steps: Init[A] at ranks 4 and 64 with alpha = rank, at 64 with alpha kept, and full
finetuning, two seeds. At 400 steps, where `study/longer.py` has sweeps: rank 128 with alpha = rank, and full finetuning;
Prodigy with `d_coef` 1 on two seeds, what was worse at own steps on one.
Prodigy also at 800 steps, on one seed. AdamW too is run for 400 steps at two rates below the sweep, on one seed, for ways
whose rates lie there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import click
import torch
from frontier.adaptive import (
    ADAPTIVE,
    D_ADAPTATION,
    PRODIGY,
    SAFEGUARDED,
    SCHEDULE_FREE,
    optimizer,
)
from laws.suggested import asked
from recording import RESULTS
from study import longer
from study.configurations import built
from study.domains import Domain, get_domain
from study.grids import FULL, Job, Listed
from study.longer import AT_A, LONGEST, MARK, of_length
from study.runs_on_file import complete
from study.suite import provenance
from study.training import train

from rankaware_optim import suggest_lr

RESTS_ON = ()
STORE = RESULTS / "frontier"
KEPT = "Init[A], s = 1/r"
TASKS = (
    "image_generation",
    "time_series",
    "audio",
    "language",
    "vision_language",
)
# configurations and ranks at a task's own steps, and in longer runs
SHORT = ((AT_A, 4), (AT_A, 64), (KEPT, 64), ("full", FULL))
LONG = ((AT_A, 128), ("full", FULL))
SEEDS = {400: 2, LONGEST: 1}
BELOW = (-12.0, -10.0)  # log2 of AdamW's rates below the sweeps of 400 steps


class Arm(NamedTuple):
    """What is trained, how long, and on how many seeds."""

    config: str
    rank: int
    steps: int
    seeds: int


def arms(domain: Domain) -> Iterator[Arm]:
    for config, rank in SHORT:
        yield Arm(config, rank, domain.steps, 2)
    for steps, seeds in SEEDS.items():
        for config, rank in LONG:
            yield Arm(config, rank, steps, seeds)


def settings(domain: Domain, way: str, arm: Arm) -> list[float]:
    """log2 of the settings that a way is run with.

    In longer runs others than Prodigy have the one that was better at own steps.
    """
    is_long = arm.steps > domain.steps
    if arm.steps == LONGEST:
        return [0.0] if way == PRODIGY else []
    if way == SCHEDULE_FREE:
        rates = [round(x, 2) for x in suggested(domain, arm)]
        return rates[1:] if is_long else rates
    if way == D_ADAPTATION:
        return [0.0]
    return [1.0] if is_long and way == SAFEGUARDED else [0.0, 1.0]


def suggested(domain: Domain, arm: Arm) -> Iterator[float]:
    """log2 of the suggested rates, as AdamW's and as schedule-free AdamW's."""
    at = asked(domain.name, arm.config, arm.rank)
    for kind in ("adamw", "AdamWScheduleFree"):
        yield math.log2(suggest_lr(at, kind).lr)


def scheme_of(way: str, config: str, steps: int) -> str:
    return f"{config} | {way}{MARK}{steps} steps"


def jobs(domain: Domain, ways: tuple[str, ...], most: int) -> Iterator[Job]:
    for arm in arms(domain):
        if arm.steps > most:
            continue
        for way in ways:
            scheme = scheme_of(way, arm.config, arm.steps)
            for setting in settings(domain, way, arm):
                is_main = (way, setting) == (PRODIGY, 0.0)
                few = arm.steps > domain.steps and not is_main
                for seed in range(1 if few else arm.seeds):
                    yield Job(domain.name, scheme, arm.rank, setting, seed)


def below_sweeps(domain: Domain) -> Iterator[Job]:
    """AdamW's runs of 400 steps at low rates that are not on file."""
    swept = longer.on_file()[domain.name]
    for config, rank in LONG:
        cell = longer.cell_of(domain.name, config, rank, 400)
        for x in BELOW:
            job = Job(*cell, x, 0)
            if job not in swept:
                yield job


def run_one(job: Job) -> float | None:
    """The held-out loss of a run; None where it diverged."""
    if job.scheme.count(" | ") == 1:
        return longer.run_one(job)
    config, way, length = job.scheme.split(" | ")
    steps = int(length.removesuffix(" steps"))
    domain = of_length(get_domain(job.domain), steps)
    model = built(domain, config, job.rank, job.seed)
    opt = optimizer(way, model, domain, steps, 2.0**job.x)
    of = ADAPTIVE[way]
    return train(domain, model, opt, job.seed, of.clip, of.warmup)


@click.command()
@click.option("--domain", "name", type=click.Choice(TASKS), required=True)
@click.option(
    "--way", "ways", type=click.Choice([*ADAPTIVE]), multiple=True, default=[*ADAPTIVE]
)
@click.option(
    "--steps", default=LONGEST, show_default=True, help="Runs of at most so many steps."
)
@click.option("--workers", default=1, show_default=True)
def main(name: str, ways: tuple[str, ...], steps: int, workers: int) -> None:
    """Run what is missing of a task."""
    torch.set_num_threads(1)
    domain = get_domain(name)
    low = below_sweeps(domain) if steps >= 400 else ()
    todo = Listed([*jobs(domain, ways, steps), *low])
    store = STORE / f"{name}.jsonl"
    complete(todo, run_one, store, workers, click.echo, provenance(name))


if __name__ == "__main__":
    main()
