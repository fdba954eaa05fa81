"""Real searches at a price of one run or two, for a run of 400 steps with alpha = rank.

    python benchmarks/frontier/searches.py --domain language    # resumable: results/frontier/searches.jsonl

Each names a rate for ranks 16 and 128 and for full finetuning, where `study/longer.py` has sweeps on other seeds. A trial
of an eighth has 50 steps, with its own warm-up and decay. Two searches of every way, each on seeds of its own. Those of
`calibration/finder.py` stand beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from calibration.make_recipes import rate_of
from calibration.plain import GRID, WAYS, Task, moved
from calibration.searches import (
    Spent,
    counted,
    recipe_of,
    scored,
    seeds_of,
)
from frontier.adaptive import ADAPTIVE, PRODIGY, optimizer
from frontier.runs import STORE, TASKS
from frontier.scores import OURS
from internals import Build, Calibration, Options, Trials, search_range
from recording import commit
from study.configurations import TUNED, built
from study.configurations import optimizer as adamw
from study.domains import Domain, get_domain
from study.grids import FULL, Job
from study.longer import AT_A, of_length
from study.training import WARMUP, shape, trained

from rankaware_optim import Reference
from rankaware_optim.laws import PRIOR_LAW, get_law

RESTS_ON = ()
STEPS, EIGHTH = 400, 50
RANKS = (16, 128, FULL)
SEEDS = (0, 1)
SEARCHES = STORE / "searches.jsonl"
Rates = dict[int, float]  # log2 of the rate by rank


class Plan(NamedTuple):
    """A search with its settings.

    Args:
        search: what it trains, and the rates that it names.
        settings: in words.
        advised_by: who says so.
    """

    search: Callable[[Ask, Spent], Rates]
    settings: str
    advised_by: str


class Ask(NamedTuple):
    """A search that is wanted."""

    task: str
    way: str
    seed: int


def prodigy_once(ask: Ask, spent: Spent) -> Rates:
    """One run of Prodigy at rank 16; its last estimate is AdamW's rate there, and the law moves it."""
    domain, of = of_length(get_domain(ask.task), STEPS), ADAPTIVE[PRODIGY]
    seed = 10 + ask.seed
    model = built(domain, AT_A, TUNED, seed)
    opt = optimizer(PRODIGY, model, domain, STEPS, 1.0)
    shaped = partial(shape, steps=STEPS, warmup=of.warmup)
    run = trained(domain, model, opt, seed, shaped, of.clip)
    scored(counted(run, spent))
    x = math.log2(opt.param_groups[0]["d"])
    return moved({TUNED: x}, ask.task, AT_A, RANKS)


def calibrated(ranks: tuple[int, ...], trials: int) -> Callable[[Ask, Spent], Rates]:
    """Trials of an eighth at these ranks; the recipe's rates."""

    def run(ask: Ask, spent: Spent) -> Rates:
        domain = get_domain(ask.task)
        recipe = recipe_of(
            domain,
            AT_A,
            ask.seed,
            spent,
            ranks=ranks,
            steps=EIGHTH,
            target_steps=STEPS,
            trials=trials,
            warmup=WARMUP,
        )
        return {rank: rate_of(recipe, AT_A, rank)[0] for rank in RANKS}

    return run


def grid(ask: Ask, spent: Spent) -> Rates:
    """Rates an octave apart at rank 16, on two seeds, with an eighth of the steps; the law moves the best."""
    domain = of_length(get_domain(ask.task), EIGHTH)
    seeds = seeds_of(ask.seed)

    def train(rank: int, seed: int, x: float) -> float:
        model = built(domain, AT_A, rank, seed)
        opt = adamw(model, domain, Job(domain.name, AT_A, rank, x, seed))
        run = trained(domain, model, opt, seed, partial(shape, steps=EIGHTH))
        return scored(counted(run, spent))

    task = Task(train, {TUNED: first_octaves(domain)}, seeds, ask.seed)
    return moved(WAYS[GRID](task), ask.task, AT_A, RANKS)


def first_octaves(domain: Domain) -> tuple[float, float]:
    """log2 of the rates at rank 16 among which a calibration begins to search."""
    law = get_law(PRIOR_LAW)
    options = Options(torch.optim.AdamW, law, (TUNED,), (0, 1), EIGHTH, trials=16)
    at = Reference(TUNED, TUNED, fan_in=domain.widths[0])
    study = Calibration(options, Build(at, domain.widths[1], {}), Trials)
    low, high = search_range(study)
    return low, high


TWO = "16 trials of an eighth at ranks 4 and 64"
GRID_OF_EIGHTHS = "8 rates × 2 seeds of an eighth, the law"
PRODIGY_ONCE = "Prodigy, then AdamW at its rate, the law"
PLANS = {
    TWO: Plan(
        calibrated((4, 64), 16),
        "`ra.calibrate(ranks=(4, 64), steps=50, target_steps=400, trials=16)`",
        OURS,
    ),
    GRID_OF_EIGHTHS: Plan(
        grid,
        "octaves among which a calibration begins; the best mean, moved by the default law",
        "what one would do by hand",
    ),
    PRODIGY_ONCE: Plan(
        prodigy_once,
        "`d_coef` 1 at rank 16 for the whole run, then its last `d`",
        "nobody; tried here",
    ),
}


class Found(NamedTuple):
    """A search on file: log2 of its rates by rank, and what it trained, in runs of the real length."""

    task: str
    way: str
    seed: int
    rates: Rates
    runs: float


def on_file() -> Iterator[Found]:
    for line in SEARCHES.read_text().splitlines() if SEARCHES.exists() else ():
        row = json.loads(line)
        rates = {int(rank): x for rank, x in row["rates"].items()}
        yield Found(row["task"], row["way"], row["seed"], rates, row["runs"])


def searched(ask: Ask) -> dict[str, Any]:
    spent = Spent()
    plan = PLANS[ask.way]
    rates = plan.search(ask, spent)
    runs = spent.steps / STEPS
    rounded = {rank: round(x, 4) for rank, x in rates.items()}
    return {
        **ask._asdict(),
        "rates": rounded,
        "runs": round(runs, 3),
        "commit": commit(),
    }


@click.command()
@click.option("--domain", "name", type=click.Choice(TASKS), required=True)
@click.option("--way", "ways", type=click.Choice([*PLANS]), multiple=True)
def main(name: str, ways: tuple[str, ...]) -> None:
    """Run what is missing of a task, each search appended at its end."""
    torch.set_num_threads(1)
    get_domain(name).warm()
    have = {(each.task, each.way, each.seed) for each in on_file()}
    asked = [Ask(name, way, seed) for seed in SEEDS for way in ways or PLANS]
    for ask in asked:
        if ask in have:
            continue
        row = searched(ask)
        SEARCHES.parent.mkdir(parents=True, exist_ok=True)
        with SEARCHES.open("a") as file:
            file.write(json.dumps(row) + "\n")
        click.echo(row)


if __name__ == "__main__":
    main()
