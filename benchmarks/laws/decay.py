"""When a law moves the rate, does AdamW's decay keep its number or its shrinkage?

    python benchmarks/laws/decay.py sweep --domain image_generation   # resumable: results/decay/image_generation.jsonl
    python benchmarks/laws/decay.py table                             # results/decay.md

A step of AdamW shrinks a parameter by lr × decay. Where a law multiplies the rate by m, the package multiplies the
shrinkage too: the decay keeps its number. With `scale_weight_decay=False` the decay is divided by m, and the shrinkage
stays. Runs have 400 steps, so that decay matters. Ranks 4 and 64 at Init[A] with alpha = rank, and full finetuning;
decays 0, .01, .1, .4, 1 and 4; at each decay its own best rate, an octave apart, on two seeds. A user who has a decay at
one of the three arms moves it to another, at that arm's own best rate. The regret is the share of the attainable gain
that the moved decay loses there, against the best decay; between decays by the spline over log2 of the decay.

**Rules**, committed before any run. The default stays as it is, unless the kept shrinkage's mean regret over all moves of
the decays .01, .1 and 1 is more than .2 points lower and its 95th percentile is not higher. Two tasks are run first. If
all decays up to .1 are within the noise floor plus .2 points of the best, in every arm of both, decay is flat there, and
no third task is run. The page names the largest lr × decay × steps up to which the loss is within .2 points of that
without decay.

**Outcome.** The default stays as it is: the decay keeps its number. Its mean regret is .43 %, with .51 % for the kept
shrinkage. Decays up to .1 are within the noise floor plus .2 points of the best in every arm of both tasks, so by the rule
no third task was run: what most people take does not matter in runs like these. A decay of 1 costs LoRA 1 to 2 %, and full
finetuning up to .4 %, or helps it by .8 (the noise floor there). Up to a product lr × decay × steps of about .15 the loss is
that without decay, in all arms but one, which is noisier than the question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import permutations, product
from typing import NamedTuple

import click
import torch
from recording import RESULTS, block, machine, number, percent, write_explained
from study.configurations import CLIP, START, built, run_in, start_of, starts
from study.domains import HELD_OUT, get_domain
from study.grids import FULL, Cell, Job, Line, Losses, Together, curve
from study.loss_curves import between
from study.regret import noise_floor, score
from study.runs_on_file import complete, made_by, read_begun
from study.suite import UNKNOWN, provenance, study_rates
from study.training import WARMUP, train

import rankaware_optim as ra

RESTS_ON = ("laws.adam", "optimizer.common", "scores")
STORE = RESULTS / "decay"
TASKS = ("image_generation", "vision_language", "super_resolution")
STEPS, SEEDS = 400, 2
DECAYS, MOVED = (0.0, 0.01, 0.1, 0.4, 1.0, 4.0), (0.01, 0.1, 1.0)
LORA = "Init[A], s = 1"
ARMS = {"rank 4": (LORA, 4), "rank 64": (LORA, 64), "full": ("full", FULL)}


def cell_of(task: str, arm: str, decay: float) -> Cell:
    config, rank = ARMS[arm]
    return task, f"{config} | {decay:g}", rank


def lines(task: str) -> list[Line]:
    """One an arm and decay, around the study's best rate."""
    grids = []
    for arm, (config, rank) in ARMS.items():
        centre = study_rates(task, config).get(rank, UNKNOWN)
        grids += [Line(cell_of(task, arm, each), round(centre)) for each in DECAYS]
    return grids


def run_one(job: Job) -> float | None:
    """The held-out loss of a run of AdamW with the scheme's decay."""
    domain = replace(get_domain(job.domain), steps=STEPS)
    if job.scheme == START:
        return run_in(domain, job, WARMUP)
    config, _, decay = job.scheme.partition(" | ")
    model = built(domain, config, job.rank, job.seed)
    opt = ra.RankAwareOptimizer(
        model,
        "adamw",
        lr=2.0**job.x,
        rates=domain.head_rates,
        method="full" if job.rank == FULL else "lora",
        law="constant",
        betas=(0.9, 0.999),
        weight_decay=float(decay),
    )
    return train(domain, model, opt, job.seed, CLIP, WARMUP)


@click.group()
def main() -> None:
    """Sweep rates at several decays, and judge which of two moves loses less."""


@main.command()
@click.option("--domain", "task", type=click.Choice((*TASKS, *HELD_OUT)), required=True)
@click.option("--workers", default=2, show_default=True)
def sweep(task: str, workers: int) -> None:
    """Run what is missing of a task's lines."""
    torch.set_num_threads(1)
    grid = Together([starts(task, range(SEEDS)), *lines(task)])
    store = STORE / f"{task}.jsonl"
    complete(grid, run_one, store, workers, click.echo, provenance(task))


# --- the table --------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """What an arm's runs show: by decay the lowest mean loss and log2 of its rate.

    Args:
        losses, rates: by decay.
        start: the loss before training.
        floor: the largest noise floor of its cells.
    """

    losses: Mapping[float, float]
    rates: Mapping[float, float]
    start: float
    floor: float

    def regret(self, decay: float) -> float:
        """The share of the gain that a decay loses, at its own best rate."""
        best = min(self.losses.values())
        by_log = {math.log2(at): loss for at, loss in self.losses.items() if at}
        loss = between(by_log, math.log2(decay)) if decay else self.losses[0.0]
        return (loss - best) / (self.start - best)

    def memory(self, decay: float) -> float:
        """lr × decay × steps at the best rate of a decay."""
        return float(2.0 ** self.rates[decay] * decay * STEPS)


def arm_of(task: str, arm: str, done: Losses) -> Arm:
    losses, rates, floors = {}, {}, []
    for decay in DECAYS:
        cell = cell_of(task, arm, decay)
        means = curve(done, cell, SEEDS)
        rates[decay] = min(means, key=means.__getitem__)
        losses[decay] = means[rates[decay]]
        floors.append(noise_floor(done, cell) or 0.0)
    return Arm(losses, rates, start_of(task, done), max(floors))


WAYS = ("the decay kept, as it is", "the shrinkage kept")
WAY_HEADS = ("way", "moves", "regret, %: mean / 95th percentile / share above 5 %")
ARM_HEADS = (
    "task",
    "arm",
    *(f"decay {each:g}" for each in DECAYS),
    "noise floor",
    "flat up to lr × decay × steps",
)
FLAT = 0.002  # of the gain


@main.command()
def table() -> None:
    """Write results/decay.md from what is on file."""
    arms = arms_on_file()
    write_explained(
        "decay",
        "Weight decay",
        __doc__,
        block("Two ways to move a decay", WAY_HEADS, list(way_rows(arms))),
        block(
            "What each decay loses, at its own best rate",
            ARM_HEADS,
            list(arm_rows(arms)),
        ),
        made_by(machine(1), *(STORE / f"{task}.jsonl" for task in arms)),
    )


def arms_on_file(tasks: Iterable[str] = TASKS) -> dict[str, dict[str, Arm]]:
    found = {}
    for task, done in read_begun(STORE, tasks).items():
        found[task] = {arm: arm_of(task, arm, done) for arm in ARMS}
    return found


def way_rows(arms: Mapping[str, Mapping[str, Arm]]) -> Iterator[list[str]]:
    for way in WAYS:
        regrets = list(moved(arms, shrinkage=way == WAYS[1]))
        yield [way, str(len(regrets)), score(regrets).words(2)]


def moved(arms: Mapping[str, Mapping[str, Arm]], shrinkage: bool) -> Iterator[float]:
    """What a decay loses that is moved from one arm to another, over all tasks and ordered pairs."""
    for task, decay in product(arms, MOVED):
        for source, target in permutations(arms[task].values(), 2):
            by = source.rates[decay] - target.rates[decay] if shrinkage else 0.0
            yield target.regret(decay * 2.0**by)


def arm_rows(arms: Mapping[str, Mapping[str, Arm]]) -> Iterator[list[str]]:
    for task, arm in product(arms, ARMS):
        of = arms[task][arm]
        regrets = [percent(of.regret(decay)) for decay in DECAYS]
        yield [task, arm, *regrets, percent(of.floor), number(flat_up_to(of), 2)]


def flat_up_to(arm: Arm) -> float:
    """The largest lr × decay × steps up to which the loss is within `FLAT` of that without decay."""
    plain, largest = arm.regret(0.0), 0.0
    for decay in DECAYS:
        if abs(arm.regret(decay) - plain) > FLAT:
            break
        largest = arm.memory(decay)
    return largest


if __name__ == "__main__":
    main()
