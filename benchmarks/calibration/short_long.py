"""Does a recipe of short runs hold for a long one? Regret at 4 and 8 times the steps, for the price of two such runs.

    python benchmarks/calibration/short_long.py run --domain language --times 4   # resumable, each run kept as it ends
    python benchmarks/calibration/short_long.py table                            # results/short_long.json and .md

Image generation and language at 4 times the study's steps, image generation at 8 times too; three configurations; the
lowest rank, 16, the highest, and full finetuning. Everything else is the study's, its warm-up of 5 % and decay over
each run's own steps included. All searches may spend 2 · target steps, whatever a step costs:

* short alone: `ra.calibrate` at the lowest and the highest rank, of the study's own steps, three full runs among them,
  its rates used at the target unchanged;
* short, moved: the same with `target_steps` the target, by the slopes that the package had then, which moved the rates;
  `longer.py` removed them;
* TPE: Optuna's at rank 16 and the target's steps, so two runs; the better rate is used everywhere;
* a fifth: ten rates an octave apart at rank 16 with a fifth of the target's steps; the best is used everywhere.

The oracle knows the target: whole octaves of seed 0 around the study's best rate (without a study `ra.suggest_lr`'s),
growing at an edge, then half octaves around the lowest, on seeds 0 and 1. Every rate, the oracle's too, is then run on
seed 2, which nothing has seen:

    regret = (loss at a rate − loss at the oracle's rate) / (loss before training − loss at the oracle's rate)

The noise floor is what the rate that is best on one seed of the oracle loses on its other seed, in the mean of both. A
smaller regret says nothing.

**Rules**, committed before any run. A plan meets the bar where its regret is 5 % at worst and .5 % in the median, over
all tasks, configurations and ranks, and its 90 % bands hold 85 to 95 % of the oracle's best rates (the parabola through
the best three). Constants are not changed after the first search; a task added later (`--domain NAME --times 4`) is
judged by the same rules, in a table of its own. Short, moved was added when the other plans were scored on both tasks
at 4 times, and before super-resolution or 8 times were. Another plan, runs of two lengths, was removed from the package
by these rules.

**Two processors.** The searches of "short alone" and "short, moved", and the runs that score them, are from another
processor than the oracle and the other plans. Some networks are trained before they are tuned, and come out with other
bits there (their hashes are below). One run of the oracle in language, made again, ended at 5.880 instead of 5.847, a
difference of .8 % of the gain.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import click
import optuna
import torch
from calibration.searches import Spent, by_arm, clocked, rate_of, recipe_of, scored
from recording import RESULTS, block, machine, percent, searched_with
from study.best_rates import best_rate
from study.configurations import (
    CLIP,
    CONFIGS,
    START,
    TUNED,
    built,
    optimizer,
    run_in,
    start_of,
    starts,
)
from study.domains import Domain, get_domain, names
from study.grids import FULL, Cell, Job, Listed, Losses, Together, curve, lowest, or_inf
from study.regret import FLOOR, noise_floor
from study.runs_on_file import complete, machines, made_by, read
from study.suite import provenance, study_rates
from study.training import WARMUP, shape, train, trained

import rankaware_optim as ra
from rankaware_optim.calibration import seeded

RESTS_ON = ("search.adam", "calibration.adam", "scores")
TASKS = (("language", 4), ("image_generation", 4), ("image_generation", 8))
STORE, SEARCHES = RESULTS / "short_long", RESULTS / "short_long_searches.jsonl"
# of the oracle, of the score, and the first that searches draw
SEEDS, LEFT_OUT, SEARCHED = (
    2,
    2,
    20,
)
PRICE, FULL_RUNS, FIFTH = 2, 3, 5
# octaves of the oracle's first grid to either side, and of a grid at most
WIDE, MOST = (
    2,
    12,
)
LOW, HIGH = -15.0, -2.0  # log2 of the rates that TPE and the fifth know of
SHORT, MOVED = "short alone", "short, moved"
TPE, A_FIFTH = "TPE at the target", "a fifth of the steps"


class Task(NamedTuple):
    """A domain at so many times the study's steps."""

    name: str
    times: int

    @property
    def domain(self) -> Domain:
        own = get_domain(self.name)
        return replace(own, steps=own.steps * self.times)

    @property
    def ranks(self) -> tuple[int, ...]:
        ranks = self.domain.ranks_swept
        return ranks[0], TUNED, ranks[-1]

    def cell(self, config: str, rank: int) -> Cell:
        return self.name, f"{'full' if rank == FULL else config} | × {self.times}", rank

    @property
    def cells(self) -> list[Cell]:
        """Every configuration and rank, and full finetuning once."""
        return [
            *(self.cell(config, rank) for config in CONFIGS for rank in self.ranks),
            self.cell("full", FULL),
        ]


def run_one(job: Job) -> float | None:
    """The held-out loss of a run at the target's steps; None where it diverged."""
    scheme, _, times = job.scheme.partition(" | × ")
    plain = job._replace(scheme=scheme)
    if not times:  # before training
        return run_in(get_domain(job.domain), plain, WARMUP)
    domain = Task(job.domain, int(times)).domain
    model = built(domain, scheme, job.rank, job.seed)
    return train(domain, model, optimizer(model, domain, plain), job.seed, CLIP, WARMUP)


# --- the oracle -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Whole octaves of seed 0 around a first guess, growing at an edge; then half octaves of both seeds."""

    cell: Cell
    guess: int

    def wanted(self, done: Losses) -> list[Job]:
        low, high = self.guess - WIDE, self.guess + WIDE
        while True:
            jobs = [Job(*self.cell, float(x), 0) for x in range(low, high + 1)]
            if missing := [job for job in jobs if job not in done]:
                return missing
            best = lowest({job.x: or_inf(done[job]) for job in jobs})
            if low < best < high or high - low >= MOST:
                break
            low, high = low - (best <= low), high + (best >= high)
        fine = [
            Job(*self.cell, best + half / 2, seed)
            for half in range(-2, 3)
            for seed in range(SEEDS)
        ]
        return [job for job in fine if job not in done]


def oracles(task: Task) -> list[Oracle]:
    """Around the study's best rates, to the octave; those of its nearest rank where one lies at an edge."""
    found = []
    for cell in task.cells:
        config = cell[1].partition(" | ")[0]
        if known := study_rates(task.name, config):
            near = min(
                known, key=lambda rank: abs(math.log2(max(rank, 1) / max(cell[2], 1)))
            )
            found.append(Oracle(cell, round(known[near])))
        else:
            model, method = (
                built(task.domain, config, cell[2], 0),
                "full" if cell[2] == FULL else "lora",
            )
            found.append(
                Oracle(cell, round(math.log2(ra.suggest_lr(model, method=method).lr)))
            )
    return found


# --- the searches ---------------------------------------------------------------------------------------------------


def searched(task: Task, config: str, plan: str) -> dict[str, Any]:
    """What a plan names for every rank: rate, and band where it has one; and every run that it made."""
    spent = Spent()
    rates = PLANS[plan](task, config, spent)
    return {
        "name": task.name,
        "times": task.times,
        "config": config,
        "plan": plan,
        "rates": rates,
        "runs": spent,
    }


def calibrated(
    task: Task, config: str, spent: Spent, moved: bool
) -> dict[int, list[float]]:
    """By `ra.calibrate`, in runs of the study's steps, the rates moved to the target's or not."""
    own = get_domain(task.name)
    target = {"target_steps": task.domain.steps} if moved else {}
    ends, budget = (task.ranks[0], task.ranks[-1]), PRICE * task.domain.steps
    options = {"ranks": ends, "budget": budget, "full_trials": FULL_RUNS, **target}
    recipe = recipe_of(own, config, 1.0, SEARCHED // 2, spent, WARMUP, **options)
    return {rank: rate_of(recipe, config, rank) for rank in (*task.ranks, FULL)}


def by_tpe(task: Task, config: str, spent: Spent) -> dict[int, list[float]]:
    """Optuna's TPE, whole runs of the target's steps."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(
        lambda trial: _tuned(
            task.domain, config, trial.suggest_float("x", LOW, HIGH), spent
        ),
        PRICE,
    )
    return {rank: [2.0 ** study.best_params["x"]] for rank in (*task.ranks, FULL)}


def by_a_fifth(task: Task, config: str, spent: Spent) -> dict[int, list[float]]:
    """The best of ten rates an octave apart, in runs of a fifth of the steps."""
    short = replace(task.domain, steps=task.domain.steps // FIFTH)
    rates = [HIGH - 1 - octaves for octaves in range(PRICE * FIFTH)]
    best = min(rates, key=lambda x: _tuned(short, config, x, spent))
    return {rank: [2.0**best] for rank in (*task.ranks, FULL)}


def _tuned(domain: Domain, config: str, x: float, spent: Spent) -> float:
    """The held-out loss of a run at rank 16; large where it is not finite."""
    with seeded(SEARCHED):
        model = built(domain, config, TUNED, SEARCHED)
        opt = optimizer(model, domain, Job(domain.name, config, TUNED, x, SEARCHED))
        run = trained(domain, model, opt, SEARCHED, partial(shape, steps=domain.steps))
        return scored(clocked(run, spent, TUNED, SEARCHED, lambda: x))


PLANS = {
    SHORT: partial(calibrated, moved=False),
    MOVED: partial(calibrated, moved=True),
    TPE: by_tpe,
    A_FIFTH: by_a_fifth,
}


def on_file() -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in SEARCHES.read_text().splitlines()]
        if SEARCHES.exists()
        else []
    )


# --- running --------------------------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Make the missing runs and searches, or the table."""


@main.command()
@click.option("--domain", "name", type=click.Choice(names()), required=True)
@click.option("--times", default=4, show_default=True)
@click.option(
    "--stage",
    type=click.Choice(("search", "oracle", "score")),
    help="One; by default all, in turn.",
)
@click.option(
    "--config", "configs", multiple=True, default=tuple(CONFIGS), show_default=True
)
@click.option("--plan", "plans", multiple=True, default=tuple(PLANS), show_default=True)
@click.option("--workers", default=2, show_default=True)
def run(
    name: str,
    times: int,
    stage: str | None,
    configs: tuple[str, ...],
    plans: tuple[str, ...],
    workers: int,
) -> None:
    """Append every missing run and search of a task to the results."""
    task, store, made = Task(name, times), STORE / f"{name}.jsonl", provenance(name)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ra.RankAwareWarning)
    if stage in (None, "search"):
        have = {
            (row["name"], row["times"], row["config"], row["plan"]) for row in on_file()
        }
        for which in (
            (name, times, config, plan) for config in configs for plan in plans
        ):
            if which not in have:
                row = {
                    **searched(task, *which[2:]),
                    "commit": made["commit"],
                    "weights": made["weights"],
                }
                with SEARCHES.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                click.echo(
                    f"{which}: {sum(steps for steps, _ in by_arm(row['runs']).values())} steps"
                )
    if stage in (None, "oracle"):
        complete(
            Together([starts(name, (LEFT_OUT,)), *oracles(task)]),
            run_one,
            store,
            workers,
            click.echo,
            made,
        )
    if stage in (None, "score"):
        complete(
            Listed(list(scoring(task, read(store)))),
            run_one,
            store,
            workers,
            click.echo,
            made,
        )


def scoring(task: Task, done: Losses) -> Iterator[Job]:
    """Every rate that is named for a cell, and the oracle's, on the seed that nothing has seen."""
    named = {(cell, x) for cell, x, _ in picks(task)} | {
        (cell, lowest(curve(done, cell, SEEDS))) for cell in task.cells
    }
    yield from (Job(*cell, x, LEFT_OUT) for cell, x in sorted(named))


def picks(task: Task) -> Iterator[tuple[Cell, float, dict[str, Any]]]:
    """(cell, log2 rate, search) of every search of a task on file, by a plan that there is."""
    for row in on_file():
        if (row["name"], row["times"]) == task and row["plan"] in PLANS:
            for rank, rate in row["rates"].items():
                yield (
                    task.cell(row["config"], int(rank)),
                    round(math.log2(rate[0]), 3),
                    row,
                )


# --- the table ------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """A plan at a rank: its regret on the seed left out, and whether its band holds the oracle's best rate.

    The noise floor is listed with the plans.
    """

    task: Task
    config: str
    plan: str
    rank: int
    regret: float
    held: bool | None


def scores(task: Task) -> Iterator[Score]:
    """Every plan at every rank whose runs are on file."""
    done = read(STORE / f"{task.name}.jsonl")
    start = start_of(task.name, done) if done else math.nan
    oracle = {
        job: loss
        for job, loss in done.items()
        if job.seed != LEFT_OUT or job.scheme == START
    }
    for config in CONFIGS:
        for rank in (*task.ranks, FULL):
            if (floor := noise_floor(oracle, task.cell(config, rank))) is not None:
                yield Score(task, config, FLOOR, rank, floor, None)
    for cell, x, row in picks(task):
        means, job = curve(done, cell, SEEDS), Job(*cell, x, LEFT_OUT)
        if (
            not means
            or job not in done
            or Job(*cell, lowest(means), LEFT_OUT) not in done
        ):
            continue
        at_best = or_inf(done[Job(*cell, lowest(means), LEFT_OUT)])
        rate, best = row["rates"][str(cell[2])], best_rate(means, start)
        held = (
            None
            if best is None or len(rate) < 3
            else math.log2(rate[1]) <= best <= math.log2(rate[2])
        )
        regret = (or_inf(done[job]) - at_best) / (start - at_best)
        yield Score(task, row["config"], row["plan"], cell[2], regret, held)


@main.command()
def table() -> None:
    """Write results/short_long.json and .md from what is on file."""
    kept = {Task(row["name"], row["times"]) for row in on_file()}
    tasks = [*(Task(*task) for task in TASKS), *sorted(kept - set(TASKS))]
    found = [score for task in tasks for score in scores(task)]
    parts = [
        "# Calibrate short, train long",
        __doc__ or "",
        verdict([s for s in found if s.task in TASKS]),
    ]
    parts.append(
        block(
            "By plan, over all tasks",
            ("plan", "rates", "worst", "median", *HEADS[-1:]),
            [*by_plan(found)],
        )
    )
    for task in tasks:
        title = f"{task.name}, {task.times} times the steps"
        if any(score.task == task for score in found):
            parts += [block(title, HEADS, [*rows(task, found)]), provenance_of(task)]
        else:
            parts.append(f"## {title}\n\nNot scored yet.")
    on = machine(1)
    (RESULTS / "short_long.md").write_text(
        "\n\n".join([*parts, made_by(on, *sorted(STORE.glob("*.jsonl")))]) + "\n"
    )
    document = {"machine": on, "scores": [score._asdict() for score in found]}
    (RESULTS / "short_long.json").write_text(json.dumps(document) + "\n")
    click.echo("\n\n".join(parts[2:]))


def provenance_of(task: Task) -> str:
    """The losses that regret is a share of, and the commits and networks of searches and runs."""
    store = STORE / f"{task.name}.jsonl"
    done, rows = (
        read(store),
        [row for row in on_file() if (row["name"], row["times"]) == task],
    )
    at_best = [
        min(means.values())
        for cell in task.cells
        if (means := curve(done, cell, SEEDS))
    ]
    networks = ", ".join(sorted({each["weights"] for each in machines(store)}))
    return (
        f"Loss before training {start_of(task.name, done):.3f}, at the oracle's rates {min(at_best):.3f} to "
        f"{max(at_best):.3f}. {searched_with(rows)} Networks of this task's runs, of any length: {networks}."
    )


HEADS = (
    "configuration",
    "plan",
    "lowest rank",
    "16",
    "highest",
    "full",
    "bands that hold",
)


def rows(task: Task, found: list[Score]) -> Iterator[list[str]]:
    """A line a configuration and plan; a dash where a run is missing."""
    for config in CONFIGS:
        for plan in (FLOOR, *PLANS):
            mine: Mapping[int, Score] = {
                s.rank: s
                for s in found
                if (s.task, s.config, s.plan) == (task, config, plan)
            }
            cells = [
                percent(mine[rank].regret) if rank in mine else "–"
                for rank in (*task.ranks, FULL)
            ]
            yield [config, plan, *cells, holding(mine.values())]


def by_plan(found: list[Score]) -> Iterator[list[str]]:
    """A line a plan, over all tasks, configurations and ranks."""
    for plan in (FLOOR, *PLANS):
        mine = [score for score in found if score.plan == plan]
        if regrets := [s.regret for s in mine]:
            figures = [percent(max(regrets)), percent(statistics.median(regrets))]
            yield [plan, str(len(mine)), *figures, holding(mine)]


def holding(scores: Iterable[Score]) -> str:
    """How many bands hold the oracle's best rate, of those that can be judged."""
    held = [s.held for s in scores if s.held is not None]
    return f"{sum(held)} of {len(held)}" if held else "–"


def verdict(found: list[Score]) -> str:
    """The rules, on what is on file of the plan that the docs advised."""
    mine = [score for score in found if score.plan == MOVED]
    if not mine:
        return f"{MOVED}: nothing was run yet."
    worst, median = (
        max(s.regret for s in mine),
        statistics.median(s.regret for s in mine),
    )
    held = [s.held for s in mine if s.held is not None]
    share = statistics.fmean(held) if held else math.nan
    met = worst <= 0.05 and median <= 0.005 and 0.85 <= share <= 0.95
    return (
        f"{MOVED}, over {len(mine)} rates: worst {percent(worst)} (bar 5 %), median {percent(median)} (bar .5 %), "
        f"bands that hold {holding(mine)} (bar 85 to 95 %): {'met' if met else 'NOT met'}."
    )


if __name__ == "__main__":
    main()
