"""How does the best rate move with the number of steps, and which form of that move carries to another task?

    python benchmarks/calibration/longer.py sweep --domain language    # resumable: results/longer/language.jsonl
    python benchmarks/calibration/longer.py search --domain language   # resumable: results/longer/language-*.toml
    python benchmarks/calibration/longer.py table                      # results/longer.md

Four tasks: image generation, vision and language, super-resolution, language. Six lengths: 25, 50, 100, 200, 400 and 800
steps, each with its own warm-up of 5 % and its own decay. Four arms: Init[A] with alpha = rank at ranks 16 and 128,
Init[B] with alpha = rank at rank 64, and full finetuning. Rates are an octave apart, on two seeds (one at 800 steps). A
grid starts around the best rate of the length before it, and grows at an edge. The best rate is the parabola's. A regret
is the share of the attainable gain that a rate loses, by the spline through the grid.

**Rules**, committed before any run.

*The form.* A form gives the octaves by which the best rate moves from one length to another. Its constants are fitted by
least squares to the moves over eight times the steps (25 to 200, 50 to 400, 100 to 800) of three tasks, and move the
rates of the fourth. The forms:

* none, and the package's as it is before these runs;
* a slope for each init (Init[A], Init[B], full), or for each of the four arms;
* either at all lengths, or up to a number of steps, or up to a number of examples, above which nothing moves. That
  number is the same for all arms. It is fitted too: 100, 200 or 400 steps, or 1,600, 3,200 or 6,400 examples.

The package takes the form with the lowest mean regret over all moves of left-out tasks. Among forms within .1 points of
it, it takes the one with the fewest constants. It stays as it is where it is among them, or where the form's 95th
percentile is higher than its own.

*The warm-up.* On two tasks the lengths 50 and 400 are swept with a warm-up of 20 % too, in three arms. If the rise comes
from short warm-ups, it is then less than half of what it is with 5 %, in the mean over arms and tasks.

*The bar.* Calibrations of the short lengths, for the price of two target runs, are moved by the form, whose constants are
those of the other three tasks. Over all tasks, arms and lengths the regret is at most 1 % in the median and 5 % at the
95th percentile, and the 90 % bands hold at least 88 % of the best rates. The docs name the shortest length that meets
this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import click
import torch
from recording import RESULTS
from study.configurations import START, run_in, starts
from study.domains import Domain, get_domain
from study.grids import FULL, Cell, Job, Losses, Together, curve, lowest
from study.optima import best_rates
from study.runs_on_file import complete, read
from study.suite import STORES, provenance
from study.training import WARMUP

RESTS_ON = ("fit", "search.adam", "calibration.adam", "horizon", "scores")
STORE = RESULTS / "longer"
TASKS = ("image_generation", "vision_language", "super_resolution", "language")
LENGTHS = (25, 50, 100, 200, 400, 800)
WARM_TASKS, WARM_LENGTHS, LONG_WARMUP = TASKS[:2], (50, 400), 0.2
LONGEST = 800  # steps, of which one seed is run
MOST = 8  # rates that a grid may have
UNKNOWN = -8  # log2 of the first rate where the study has none


class Arm(NamedTuple):
    """A configuration at a rank."""

    config: str
    rank: int

    def cell(self, task: str, steps: int, warmup: float = WARMUP) -> Cell:
        """Its runs of a length in a task."""
        scheme = f"{self.config} | {steps} steps"
        if warmup != WARMUP:
            scheme += f", warm-up {warmup}"
        return task, scheme, self.rank


ARMS = {
    "Init[A], rank 16": Arm("Init[A], s = 1", 16),
    "Init[A], rank 128": Arm("Init[A], s = 1", 128),
    "Init[B], rank 64": Arm("Init[B], s = 1", 64),
    "full": Arm("full", FULL),
}
WARM_ARMS = tuple(ARMS)[1:]


@click.group()
def main() -> None:
    """Sweep rates by length, calibrate at short lengths, and judge the forms."""


# --- the sweeps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """The grids of an arm by rising length, each around the best rate of the length before it."""

    cells: Sequence[Cell]
    guess: int

    def wanted(self, done: Losses) -> list[Job]:
        centre = self.guess
        for cell in self.cells:
            low, high = centre - 1, centre + 1
            while True:
                jobs = [
                    Job(*cell, float(x), seed)
                    for x in range(low, high + 1)
                    for seed in range(seeds_of(cell))
                ]
                if missing := [job for job in jobs if job not in done]:
                    return missing
                best = round(lowest(curve(done, cell, seeds_of(cell))))
                if low < best < high or high - low + 1 >= MOST:
                    break
                low, high = low - (best <= low), high + (best >= high)
            centre = best
        return []


def seeds_of(cell: Cell) -> int:
    return 1 if length_of(cell[1])[0] == LONGEST else 2


def length_of(scheme: str) -> tuple[int, float]:
    """Steps and warm-up of a scheme."""
    length, _, warmup = scheme.partition(" | ")[2].partition(", warm-up ")
    return int(length.removesuffix(" steps")), float(warmup or WARMUP)


def chains(task: str) -> list[Chain]:
    """One an arm and warm-up, from the study's best rate at the nearest rank."""
    done = read(STORES / f"{task}.jsonl")
    plans = [(arm, LENGTHS, WARMUP) for arm in ARMS.values()]
    if task in WARM_TASKS:
        plans += [(ARMS[name], WARM_LENGTHS, LONG_WARMUP) for name in WARM_ARMS]
    found = []
    for arm, lengths, warmup in plans:
        known = best_rates(done, task, arm.config)
        nearest = min(known, key=lambda rank: abs(rank - arm.rank), default=None)
        guess = UNKNOWN if nearest is None else round(known[nearest])
        cells = [arm.cell(task, steps, warmup) for steps in lengths]
        found.append(Chain(cells, guess))
    return found


def run_one(job: Job) -> float | None:
    """The held-out loss of a run; None where it diverged."""
    if job.scheme == START:
        return run_in(get_domain(job.domain), job, WARMUP)
    steps, warmup = length_of(job.scheme)
    plain = job._replace(scheme=job.scheme.partition(" | ")[0])
    return run_in(of_length(job.domain, steps), plain, warmup)


def of_length(task: str, steps: int) -> Domain:
    return replace(get_domain(task), steps=steps)


@main.command()
@click.option("--domain", "task", type=click.Choice(TASKS), required=True)
@click.option("--workers", default=2, show_default=True)
def sweep(task: str, workers: int) -> None:
    """Run what is missing of a task's grids."""
    torch.set_num_threads(1)
    grid = Together([starts(task, range(2)), *chains(task)])
    store = STORE / f"{task}.jsonl"
    complete(grid, run_one, store, workers, click.echo, provenance(task))


if __name__ == "__main__":
    main()
