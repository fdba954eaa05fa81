"""Going on with a trained adapter: at which rate, and does the law move it between ranks?

    python benchmarks/study/going_on.py --domain language    # resumable: results/going_on.jsonl
    python benchmarks/study/going_on.py                      # results/going_on.md, of the runs on file

An adapter has been trained, and there are new data. Is it trained on, or merged and a fresh one trained? At the same rate?
A trained pair is neither `B = 0` nor `A = 0`, so no law's derivation covers it.

**Two tasks.** *language*: the study's Llama that learned Python, then learns WordNet's glosses, 100 steps. *vision*:
the study's EfficientNet that learned MNIST's digits, then learns scikit-learn's, 40 steps. Stage 1 is the study's run,
Init[A] with alpha = rank, at its sweep's best rate (of rank 8 on the line between 4 and 16). Stage 2 goes on from the
*trained* adapter, or from the *merged* network with a *fresh* adapter at Init[A], with a new AdamW and a new schedule, at
ranks 8 and 64, on two seeds. Its rates are an octave apart around stage 1's best one: five (three before, which the rule
was first applied to), and more where the best is at an edge. The classifier goes on at its fixed rate.

**The rule, written before the runs.** The gain is what stage 2's best rate lowers stage 2's held-out loss by, from where
it starts. Losses lie on the study's spline.

1. *Stage 1's rate holds* for a start if it loses at most 2 % of the gain in the mean of the four cells and 5 at worst.
2. *Between ranks*: stage 2's best rate at one rank is moved to the other by the default law as from Init[A], as from
   Init[B], and kept. What loses least in the mean over both tasks and both directions is the rule for a trained pair, unless
   it loses more than half a point more than another in one of the tasks: then no law moves it, and a kept rate stays.
3. *Which start*: that with the lower loss at its own best rate in all four cells, else neither.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import click
import torch
from recording import RESULTS, block, machine, number, percent, write_explained
from study.best_rates import best_rate
from study.configurations import CLIP, optimizer
from study.domains import Domain, _efficientnet, _llama, get_domain
from study.domains._adapters import adapt
from study.domains._assets import made_once
from study.domains._wordnet import glosses
from study.grids import (
    Cell,
    Job,
    Line,
    Listed,
    Losses,
    Together,
    all_means,
    around,
    curve,
    lowest,
)
from study.loss_curves import regret_between
from study.moving import INITS, octaves
from study.runs_on_file import complete, made_by, read
from study.suite import provenance, study_rates
from study.training import train
from torch import Tensor, nn

from rankaware_optim import Falling

RESTS_ON = ("laws",)
STORE = RESULTS / "going_on.jsonl"
AT_A, AT_B = INITS
TRAINED, FRESH, BEFORE = "trained", "merged and fresh", "after stage 1"
STARTS, RANKS = (TRAINED, FRESH), (8, 64)
SEEDS = 2
TASKS = ("language", "vision_classification")
LATER = 100  # is added to a seed for the batches of stage 2
MOST, WORST, NEARLY = 0.02, 0.05, 0.005
WAYS = {
    "the default law, Init[A]": AT_A,
    "the default law, Init[B]": AT_B,
    "kept": None,
}


# --- the runs ---------------------------------------------------------------------------------------------------------


def later(task: str) -> Domain:
    """The domain of stage 2."""
    if task == "vision_classification":
        return get_domain("digits_vision")
    first = get_domain(task)
    ids = made_once("tokens-glosses-v1", _tokenise)["ids"].long()
    cut = len(ids) * 9 // 10

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        return float(first.loss(model, next(_llama.windows(ids[cut:], 64, 1))))

    def batches(seed: int, batch: int) -> Any:
        return _llama.windows(ids[:cut], batch, seed)

    return replace(first, batches=batches, evaluate=evaluate)


def _tokenise() -> dict[str, Tensor]:
    text = "\n".join(f"{word}: {gloss}." for word, gloss, _ in glosses()[:20000])
    return {"ids": torch.tensor(_llama.tokenizer().encode(text).ids, dtype=torch.int16)}


def first_rate(task: str, rank: int) -> float:
    """log2 of stage 1's best rate by the study's sweep, on a line over log2 of the rank."""
    rates = study_rates(task, AT_A)
    if rank in rates:
        return rates[rank]
    low = max(other for other in rates if other < rank)
    high = min(other for other in rates if other > rank)
    share = math.log(rank / low) / math.log(high / low)
    return rates[low] + share * (rates[high] - rates[low])


@cache
def stage_1(task: str, rank: int, seed: int) -> dict[str, Tensor]:
    """The weights after the study's run at its best rate."""
    domain = get_domain(task)
    model = domain.build(rank, float(rank), "A", seed)
    job = Job(task, AT_A, rank, first_rate(task, rank), seed)
    train(domain, model, optimizer(model, domain, job), seed, CLIP)
    return model.state_dict()


def begun(task: str, start: str, rank: int, seed: int) -> nn.Module:
    """The model as stage 2 begins."""
    model: Any = get_domain(task).build(rank, float(rank), "A", seed)
    model.load_state_dict(stage_1(task, rank, seed))
    if start == TRAINED:
        return model
    vision = task == "vision_classification"
    layers, saved = (
        (_efficientnet.LAYERS, ["classifier"]) if vision else (_llama.LAYERS, [])
    )
    merged = model.merge_and_unload().requires_grad_(False)
    adapted = adapt(merged, rank, float(rank), "A", seed + LATER, layers, saved)
    return adapted.eval() if vision else adapted


def run_one(job: Job) -> float | None:
    """The held-out loss of stage 2; before its first step for the scheme `BEFORE`."""
    start, domain = job.scheme, later(job.domain)
    model = begun(job.domain, TRAINED if start == BEFORE else start, job.rank, job.seed)
    if start == BEFORE:
        return domain.evaluate(model)
    opt = optimizer(model, domain, job)
    return train(domain, model, opt, job.seed + LATER, CLIP)


# --- what they show ---------------------------------------------------------------------------------------------------


class Stage:
    """Stage 2 at a rank from a start: its losses by rate, its best rate, and what a rate loses."""

    def __init__(self, done: Losses, cell: Cell) -> None:
        task, _, rank = cell
        self.means = all_means(done, cell, SEEDS)
        self.before = all_means(done, (task, BEFORE, rank), SEEDS)[0.0]
        self.at_best = self.means[lowest(self.means)]
        self.best = best_rate(curve(done, cell, SEEDS), self.before)

    def lost(self, x: float) -> float:
        gain = self.before - self.at_best
        shares = {at: (loss - self.at_best) / gain for at, loss in self.means.items()}
        return regret_between(shares, x)


def moves(
    stages: dict[Cell, Stage], start: str, way: str
) -> Iterator[tuple[str, float]]:
    """(task, share of the gain lost) of a best rate that is moved to the other rank."""
    for task in TASKS:
        for a, b in (RANKS, RANKS[::-1]):
            x = stages[task, start, a].best
            if x is not None:
                yield task, stages[task, start, b].lost(x + shift(task, way, a, b))


def shift(task: str, way: str, a: int, b: int) -> float:
    config = WAYS[way]
    if config is None:
        return 0.0
    return octaves(task, config, b, Falling()) - octaves(task, config, a, Falling())


def of_cells(stages: dict[Cell, Stage]) -> str:
    rows = []
    for (task, start, rank), stage in stages.items():
        first = first_rate(task, rank)
        off = None if stage.best is None else stage.best - first
        row = [task, start, str(rank), number(first), number(stage.best)]
        row += [number(off, sign=True), percent(stage.lost(first))]
        rows.append([*row, number(stage.before, 3), number(stage.at_best, 4)])
    heads = [
        "task",
        "start",
        "rank",
        "stage 1's best, log2",
        "stage 2's",
        "octaves above",
    ]
    heads += ["stage 1's rate loses", "loss before", "loss at best"]
    return block("Stage 1's rate in stage 2", heads, rows)


def of_moves(stages: dict[Cell, Stage]) -> str:
    rows = []
    for start in STARTS:
        for way in WAYS:
            lost = list(moves(stages, start, way))
            shifts = [number(shift(task, way, *RANKS), sign=True) for task in TASKS]
            row = [start, way, " and ".join(shifts)]
            for task in TASKS:
                row.append(percent(statistics.fmean(x for t, x in lost if t == task)))
            rows.append([*row, percent(statistics.fmean(x for _, x in lost))])
    found = []
    for start in STARTS:
        ends = [[stages[task, start, rank].best for rank in RANKS] for task in TASKS]
        words = [number(b - a, sign=True) for a, b in ends if None not in (a, b)]
        found.append(f"{start}: {' and '.join(words)}")
    note = f"Best rates move from rank 8 to 64 by, octaves: {'; '.join(found)}."
    heads = [
        "start",
        "way",
        "octaves from 8 to 64",
        *(f"{task} loses" for task in TASKS),
    ]
    return block("Between ranks 8 and 64", [*heads, "mean"], rows) + f"\n\n{note}"


def verdict(stages: dict[Cell, Stage]) -> str:
    lines = []
    for start in STARTS:
        lost = [
            s.lost(first_rate(t, r)) for (t, st, r), s in stages.items() if st == start
        ]
        holds = statistics.fmean(lost) <= MOST and max(lost) <= WORST
        means = {way: of_tasks(stages, start, way) for way in WAYS}
        least = min(WAYS, key=lambda way: statistics.fmean(means[way]))
        clear = all(
            mine <= other + NEARLY
            for way in WAYS
            for mine, other in zip(means[least], means[way], strict=True)
        )
        lines.append(
            f"* *{start}*: stage 1's rate loses {percent(statistics.fmean(lost))} in the mean, "
            f"{percent(max(lost))} at worst: it {'holds' if holds else 'does not hold'}. Between "
            f"ranks {least if clear else 'no law'} is the rule."
        )
    pairs = [
        [stages[t, start, r].at_best for start in STARTS] for t in TASKS for r in RANKS
    ]
    ahead = sum(a < b for a, b in pairs)
    settled = "" if ahead in (0, len(pairs)) else ", so neither start is the rule"
    words = f"The trained adapter ends lower in {ahead} of {len(pairs)} cells{settled}."
    lines.append(f"* {words}")
    return "\n".join(lines)


def of_tasks(stages: dict[Cell, Stage], start: str, way: str) -> list[float]:
    lost = list(moves(stages, start, way))
    return [statistics.fmean(x for t, x in lost if t == task) for task in TASKS]


def cells_of(task: str) -> list[Cell]:
    return [(task, start, rank) for rank in RANKS for start in STARTS]


@click.command()
@click.option("--domain", "task", type=click.Choice(TASKS))
def main(task: str | None) -> None:
    """Run what is missing of a task, or write the page."""
    torch.set_num_threads(1)
    if task:
        before = [Job(task, BEFORE, r, 0.0, s) for r in RANKS for s in range(SEEDS)]
        lines, five = [], []
        for cell in cells_of(task):
            centre = round(first_rate(task, cell[2]))
            lines.append(Line(cell, centre, SEEDS))
            for x in around(centre, 2, 1):
                five += [Job(*cell, float(x), seed) for seed in range(SEEDS)]
        grid = Together([Listed([*before, *five]), *lines])
        complete(grid, run_one, STORE, 1, click.echo, provenance(task))
        return
    done = read(STORE)
    stages = {cell: Stage(done, cell) for each in TASKS for cell in cells_of(each)}
    parts = verdict(stages), of_cells(stages), of_moves(stages)
    title = "Going on with a trained adapter"
    write_explained("going_on", title, __doc__, *parts, made_by(machine(1), STORE))


if __name__ == "__main__":
    main()
