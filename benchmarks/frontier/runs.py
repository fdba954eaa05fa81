"""Real runs of optimizers that find their own rate, on the seeds of the study's sweeps.

    python benchmarks/frontier/runs.py --domain language    # resumable: results/frontier/language.jsonl

Five tasks. At a task's own steps: Init[A] at ranks 4 and 64 with alpha = rank, at 64 with alpha kept, and full
finetuning, two seeds. At 400 steps, where `study/longer.py` has sweeps: rank 128 with alpha = rank, and full finetuning;
Prodigy with `d_coef` 1 on two seeds, the others on one: what was worse at own steps, and what its README names beside it.
Prodigy with `d_coef` 1 also at 800 steps, on one seed. AdamW too is run for 400 steps at two rates below the sweep, on one seed, for ways
whose rates lie there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import click
import torch
from frontier.adaptive import (
    ADAPTIVE,
    D_ADAPTATION,
    FROM_D0,
    PRODIGY,
    SAFEGUARDED,
    SCHEDULE_FREE,
    optimizer,
)
from laws.suggested import asked
from recording import RESULTS
from study import longer
from study.configurations import CONFIGS, built
from study.domains import Domain, get_domain
from study.grids import FULL, Job, Listed
from study.longer import LONGEST, MARK, of_length
from study.runs_on_file import complete
from study.suite import provenance
from study.training import train

from rankaware_optim import suggest_lr

RESTS_ON = ()
STORE = RESULTS / "frontier"
AT_A, KEPT, AT_B = CONFIGS
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
BELOW = (-12.0, -10.0)  # log2 of AdamW's rates below the sweeps of 400 steps


class Row(NamedTuple):
    """A way with a setting, and on how many seeds it is run: at own steps, at 400, and at the longest.

    Args:
        way: a name of `ADAPTIVE`.
        setting: what varies; for the schedule-free one the optimizer whose suggested rate it has.
        seeds: by length. In longer runs what was worse at own steps has fewer.
    """

    way: str
    setting: float | str
    seeds: tuple[int, int, int]

    @property
    def words(self) -> str:
        """The setting, as tables name it."""
        setting = self.setting
        said = setting if isinstance(setting, str) else f"{setting:g}"
        return f"{ADAPTIVE[self.way].varies} {said}"

    def jobs(self, domain: Domain, steps: int) -> Iterator[Job]:
        """Its runs of so many steps."""
        of_length = {400: self.seeds[1], LONGEST: self.seeds[2]}
        seeds = of_length.get(steps, self.seeds[0])
        for config, rank in LONG if steps in of_length else SHORT:
            scheme = scheme_of(self.way, config, steps)
            x = self.x(domain, config, rank)
            for seed in range(seeds):
                yield Job(domain.name, scheme, rank, x, seed)

    def x(self, domain: Domain, config: str, rank: int) -> float:
        """log2 of the setting in a cell."""
        if not isinstance(self.setting, str):
            return math.log2(self.setting)
        at = asked(domain.name, config, rank)
        return round(math.log2(suggest_lr(at, self.setting).lr), 2)


ROWS = (
    Row(PRODIGY, 0.5, (2, 1, 0)),
    Row(PRODIGY, 1.0, (2, 2, 1)),
    Row(PRODIGY, 2.0, (2, 1, 0)),
    Row(FROM_D0, 1e-5, (2, 1, 0)),
    Row(FROM_D0, 1e-4, (2, 1, 0)),
    Row(SAFEGUARDED, 1.0, (2, 0, 0)),
    Row(SAFEGUARDED, 2.0, (2, 1, 0)),
    Row(D_ADAPTATION, 1.0, (2, 1, 0)),
    Row(SCHEDULE_FREE, "adamw", (2, 0, 0)),
    Row(SCHEDULE_FREE, "AdamWScheduleFree", (2, 1, 0)),
)


def scheme_of(way: str, config: str, steps: int) -> str:
    return MARK.join((config, way, f"{steps} steps"))


def jobs(domain: Domain, ways: Sequence[str], most: int) -> Iterator[Job]:
    """The runs of these ways of at most so many steps."""
    for row in ROWS:
        for steps in (domain.steps, 400, LONGEST):
            if row.way in ways and steps <= most:
                yield from row.jobs(domain, steps)


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
    if job.scheme.count(MARK) == 1:
        return longer.run_one(job)
    config, way, length = job.scheme.split(MARK)
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
