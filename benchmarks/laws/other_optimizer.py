"""What is AdamW's best rate for another optimizer?

    python benchmarks/laws/other_optimizer.py sweep --domain image_generation --optimizer Lion   # resumable
    python benchmarks/laws/other_optimizer.py table                                # results/other_optimizer.md

Ranks 4, 16 and 64 at Init[A] with alpha = rank, and full finetuning, in three tasks of the study with its steps, warm-up
and decay. Each optimizer has the weight decay of AdamW and its own other defaults. Rates are an octave apart, on two
seeds, and grow at an edge. The best rate is the parabola's. Its ratio is log2 of it less AdamW's on the same network.

**Rules**, committed before any run. Two tasks are run first. A ratio holds if every arm's, of every task, is within half
an octave of the median over LoRA's arms, or over full finetuning's. `convert_lr(..., optimizer=...)` gives the median of
those that hold, with a band of the root mean square of left-out errors: the ratio of a task from the median of the
others. For the others the page says how far they spread, and nothing is converted. An optimizer whose ratio differs by
more than an octave between two tasks is not run on the third.

**Outcome.** No ratio of LoRA's holds on all three tasks, so nothing is converted, and `convert_lr` has no such option. On
the first two tasks those of Lion, schedule-free AdamW and Adafactor (with a rate of its own) were within .35 octaves of
their medians. SOAP's and Muon's were not. The third task decides against them, mostly at rank 64, where
AdamW's own best rate is not known to an octave: AdamW with other betas, which can hardly differ, is 1.1 octaves lower there.
So the rule asked for more than reinforcement learning can show. By its letter it stays.

Of full finetuning two ratios hold: schedule-free AdamW's and Adafactor's, beside that of AdamW's other betas. A conversion
that serves those alone was not worth an option. Lion's best rate is lower than AdamW's by 1.0 octave in the median, a half,
where its authors advise a third to a tenth: `suggest_lr` has both in its band. Muon was run on image generation alone: its
ratio rises from .2 octaves at rank 4 to 1.9 at rank 64, since its own best rate stays where AdamW's falls, and with that
it cannot hold. (It takes only matrices, and vision and language trains a bias.)
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import click
import torch
from recording import RESULTS, block, machine, number, write_explained
from study.best_rates import best_rate
from study.configurations import ADAMW, CLIP, START, built, run_in, start_of, starts
from study.domains import HELD_OUT, get_domain
from study.grids import FULL, Cell, Job, Line, Losses, Together, curve
from study.runs_on_file import complete, made_by, read_begun
from study.suite import provenance, study_rates
from study.training import WARMUP, train

import rankaware_optim as ra

RESTS_ON = ("optimizer.families", "scores")
STORE = RESULTS / "other_optimizer"
TASKS = ("image_generation", "vision_language", "reinforcement")
NOT_MATRICES = ("vision_language", "audio")  # what they train, so not by Muon
SEEDS = 2
LORA = "Init[A], s = 1"
ARMS = {
    "rank 4": (LORA, 4),
    "rank 16": (LORA, 16),
    "rank 64": (LORA, 64),
    "full": ("full", FULL),
}


class Other(NamedTuple):
    """An optimizer.

    Args:
        optimizer: its class, or its name.
        guess: octaves from AdamW's best rate to the first that is tried.
        settings: what differs from its defaults, beside the weight decay.
    """

    optimizer: str
    guess: int = 0
    settings: Mapping[str, Any] = {}


ADAM, MUON = "AdamW", "Muon"
OPTIMIZERS = {
    ADAM: Other("adamw", 0, {"betas": (0.9, 0.999)}),
    "AdamW, betas .9 and .95": Other("adamw", 0, {"betas": (0.9, 0.95)}),
    "Lion": Other("pytorch_optimizer:Lion", -2),
    MUON: Other("torch.optim.Muon", 1),
    "SOAP": Other("pytorch_optimizer:SOAP"),
    "schedule-free AdamW": Other("pytorch_optimizer:ScheduleFreeAdamW", 1),
    "Adafactor": Other(
        "transformers.optimization:Adafactor",
        0,
        {"scale_parameter": False, "relative_step": False},
    ),
}


def cell_of(task: str, arm: str, optimizer: str) -> Cell:
    config, rank = ARMS[arm]
    return task, f"{config} | {optimizer}", rank


def lines(task: str, optimizer: str) -> list[Line]:
    """One an arm, around the study's best rate for AdamW and the optimizer's guess."""
    grids = []
    for arm, (config, rank) in ARMS.items():
        adamw = round(study_rates(task, config)[rank])
        centre = adamw + OPTIMIZERS[optimizer].guess
        grids.append(Line(cell_of(task, arm, optimizer), centre, SEEDS))
    return grids


def run_one(job: Job) -> float | None:
    """The held-out loss of a run of the scheme's optimizer."""
    domain = get_domain(job.domain)
    if job.scheme == START:
        return run_in(domain, job, WARMUP)
    config, _, name = job.scheme.partition(" | ")
    other = OPTIMIZERS[name]
    model = built(domain, config, job.rank, job.seed)
    opt = ra.RankAwareOptimizer(
        model,
        other.optimizer,
        lr=2.0**job.x,
        rates=domain.head_rates,
        method="full" if job.rank == FULL else "lora",
        law="constant",
        weight_decay=ADAMW["weight_decay"],
        **other.settings,
    )
    return train(domain, model, opt, job.seed, CLIP, WARMUP)


@click.group()
def main() -> None:
    """Sweep the rates of other optimizers, and compare them with AdamW's."""


@main.command()
@click.option("--domain", "task", type=click.Choice((*TASKS, *HELD_OUT)), required=True)
@click.option(
    "--optimizer",
    "names",
    type=click.Choice([*OPTIMIZERS]),
    multiple=True,
    default=[*OPTIMIZERS],
)
@click.option("--workers", default=2, show_default=True)
def sweep(task: str, names: tuple[str, ...], workers: int) -> None:
    """Run what is missing of a task's lines."""
    torch.set_num_threads(1)
    chosen = [name for name in names if name != MUON or task not in NOT_MATRICES]
    grids = [line for name in chosen for line in lines(task, name)]
    grid = Together([starts(task, range(SEEDS)), *grids])
    store = STORE / f"{task}.jsonl"
    complete(grid, run_one, store, workers, click.echo, provenance(task))


# --- the table --------------------------------------------------------------------------------------------------------

HEADS = (
    "optimizer",
    "task",
    *(f"{arm}: log2 rate, octaves from AdamW" for arm in ARMS),
)
RATIO_HEADS = (
    "optimizer",
    "of",
    "median octaves",
    "from",
    "to",
    "left-out error",
    "holds",
)
WITHIN = 0.5  # octaves


@main.command()
def table() -> None:
    """Write results/other_optimizer.md from what is on file."""
    runs = runs_on_file()
    write_explained(
        "other_optimizer",
        "The other optimizer",
        __doc__,
        block("Ratios", RATIO_HEADS, list(ratio_rows(runs))),
        block("Best rates", HEADS, list(rate_rows(runs))),
        made_by(machine(1), *(STORE / f"{task}.jsonl" for task in runs)),
    )


def runs_on_file(tasks: Iterable[str] = TASKS) -> dict[str, Losses]:
    return read_begun(STORE, tasks)


def best(done: Losses, task: str, arm: str, optimizer: str) -> float | None:
    means = curve(done, cell_of(task, arm, optimizer), SEEDS)
    return best_rate(means, start_of(task, done)) if means else None


def ratio(done: Losses, task: str, arm: str, optimizer: str) -> float | None:
    """Octaves from AdamW's best rate to the optimizer's; None if either is not known."""
    rates = [best(done, task, arm, each) for each in (optimizer, ADAM)]
    if rates[0] is None or rates[1] is None:
        return None
    return rates[0] - rates[1]


def rate_rows(runs: Mapping[str, Losses]) -> Iterator[list[str]]:
    for name, task in product(OPTIMIZERS, runs):
        cells = []
        for arm in ARMS:
            rate = best(runs[task], task, arm, name)
            apart = ratio(runs[task], task, arm, name)
            cells.append(f"{number(rate, 1)}, {number(apart, 1, sign=True)}")
        yield [name, task, *cells]


def ratio_rows(runs: Mapping[str, Losses]) -> Iterator[list[str]]:
    """The ratios of LoRA's arms, and those of full finetuning."""
    for name, kind, of in ratios(runs):
        octaves = [number(each, 2, sign=True) for each in (of.octaves, *of.ends)]
        yield [name, kind, *octaves, number(of.error), "yes" if of.holds else "NO"]


class Ratio(NamedTuple):
    """An optimizer's best rate against AdamW's, octaves.

    Args:
        octaves: the median over tasks and arms.
        ends: the lowest and the highest.
        error: the root mean square error of a task's ratios from the median of the other tasks'.
    """

    octaves: float
    ends: tuple[float, float]
    error: float

    @property
    def holds(self) -> bool:
        return max(abs(end - self.octaves) for end in self.ends) <= WITHIN


def ratios(runs: Mapping[str, Losses]) -> Iterator[tuple[str, str, Ratio]]:
    """Each optimizer's ratio that two tasks have, of LoRA and of full finetuning."""
    for name, kind in product(list(OPTIMIZERS)[1:], ("LoRA", "full")):
        apart = by_task(runs, name, kind)
        if len(apart) > 1:
            yield name, kind, judged(apart)


def by_task(
    runs: Mapping[str, Losses], optimizer: str, kind: str
) -> dict[str, list[float]]:
    """The ratios of the arms of LoRA or of full finetuning that are known."""
    arms = [arm for arm in ARMS if (arm == "full") == (kind == "full")]
    known: dict[str, list[float]] = {}
    for task, arm in product(runs, arms):
        apart = ratio(runs[task], task, arm, optimizer)
        if apart is not None:
            known.setdefault(task, []).append(apart)
    return known


def judged(apart: Mapping[str, Sequence[float]]) -> Ratio:
    """The ratio of what every task has."""
    errors = []
    for task, octaves in apart.items():
        others = [each for other in apart if other != task for each in apart[other]]
        errors += [(each - statistics.median(others)) ** 2 for each in octaves]
    every = [each for octaves in apart.values() for each in octaves]
    ends = min(every), max(every)
    return Ratio(statistics.median(every), ends, statistics.fmean(errors) ** 0.5)


if __name__ == "__main__":
    main()
