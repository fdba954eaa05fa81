"""Two couplings of the fit: full runs with LoRA's rates, and one divergence with a rank's cliff.

    python benchmarks/calibration/couplings.py search   # resumable, about an hour of two cores: results/couplings.jsonl
    python benchmarks/calibration/couplings.py table    # ten minutes: results/couplings.md

Three rules, and what adopts them. Those of the cliff were committed before their runs. *Apart* is judged by runs that
were on file, and was written after a first look at them.

*Apart*: LoRA's rates come from the fit without the full runs. Every recipe of the study is fitted again from its stored
trials, with its full runs and without. Adopted if the mean regret and its 95th percentile, over every rank that was
swept, both fall.

*Repeat*: a divergence less than 1.5 octaves above the best finished run of its rank is run again on the other seed, at
the cost of a run. If the repeat ends well, the divergence does not count. *Cap*: at a rank that was tried, the rate is
at most an octave above its best finished run. Both are judged by new searches at equal steps, of search seeds that no
recipe has, at Init[B] and at Init[A] with alpha kept, on three tasks. Two of them have the study's worst recipes at the
lowest rank. A rule is adopted if the mean regret and its 95th percentile at the lowest rank both fall, and neither
rises over all ranks.

A regret is the share of the attainable gain that the recipe's rate loses, by the spline through the study's sweep.

**Outcome: the fit and the search stay as they are.** *Apart* fails: without the full runs LoRA's rates lose 1.29 %
instead of 1.11 %, and most at Init[B]. Full runs help them. *Cap* fails by its 95th percentile, which stays; it acts in
one search of 18. *Repeat* meets the letter of its rule and is not adopted. Its gain of .02 points, from three searches of
one task, is far below the noise floor of one point. The rule should have asked for more than that. Neither touches the
largest loss. In image generation at Init[B] the loss falls up to the cliff, on every seed, and all three searches stay
0.9 octaves below the best rate that was swept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from itertools import compress, product
from multiprocessing import get_context
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

import click
import numpy as np
import torch
from calibration.make_recipes import FULL_TRIALS, SHARE, paths_of
from calibration.searches import rate_of
from calibration.searches import recipe_of as search_recipe
from recording import RESULTS, block, machine, made_on, percent, write_explained
from study.configurations import CONFIGS
from study.domains import STUDY, get_domain
from study.grids import Losses
from study.moved_runs import sweeps
from study.optima import ranks_in
from study.regret import lost, score
from study.training import WARMUP

from rankaware_optim import Recipe
from rankaware_optim.calibration._schedule import Schedule
from rankaware_optim.calibration._search import BracketSampler
from rankaware_optim.calibration._trials import Setting, TrialRecord, Trials
from rankaware_optim.fitting import (
    Fit,
    Observation,
    Prior,
    diverged,
    fit_observations,
    prior_of,
)
from rankaware_optim.recipe import recipe_of
from rankaware_optim.reports._picture import _observations, _trials

RESTS_ON = ("fit", "search.adam", "calibration.adam", "recipes", "scores")
STORE = RESULTS / "couplings.jsonl"
TASKS = ("image_generation", "text_classification", "reinforcement")
SETTINGS = ("Init[B], s = 1", "Init[A], s = 1/r")
SEEDS = (3, 4, 5)  # the study's recipes have 0 to 2
NEAR = 1.5  # octaves above the best finished run in which a divergence is repeated
HIGHEST = 1.0  # octaves above the best finished run that a rate may have
SAME = 1e-9  # octaves
BY_FIT = (
    "fitted_lr",
    "reference",
    "law",
    "covariance",
    "steepness",
    "scatter",
    "ceiling",
    "lean",
)  # what a fit decides of a recipe


class Job(NamedTuple):
    """A search: its task, configuration and seed, and whether divergences are repeated."""

    task: str
    config: str
    seed: int
    repeat: bool


class Rated(NamedTuple):
    """A recipe's rate at a rank, log2, with the best finished run's where the rank was tried."""

    task: str
    config: str
    rank: int
    x: float
    finished: float | None


@click.group()
def main() -> None:
    """Judge three rules of the fit and of the search."""


# --- full runs and LoRA's rates ---------------------------------------------------------------------------------------


class Carry(Protocol):
    """A move of a fit from the steps of its trials to others."""

    def moved(self, trial: Observation) -> Observation: ...

    def prior_of_trials(self, prior: Prior) -> Prior: ...

    def to_target(self, fit: Fit, prior: Prior) -> Fit: ...


def refitted(
    recipe: Recipe, with_full: bool = True, carry: Carry | None = None
) -> Recipe:
    """A recipe of the same trials by the fit as it is.

    Args:
        recipe: the recipe.
        with_full: whether its runs of full finetuning count.
        carry: the move from the steps of the trials to those of the recipe; None for none.
    """
    # In reference coordinates, as the fit has them.
    in_base = {**recipe.tensors, "own_lr": recipe.tensors["lr"]}
    points = _trials(replace(recipe, tensors=in_base))
    observations: list[Observation] = []
    for rank, of_rank in points.items():
        if rank is not None or with_full:
            observations += [each for each, _ in _observations(rank, of_rank, 0.0)]
    prior = prior_of(recipe.reference, recipe.ranks, recipe.full_fan_in)
    at_trials = prior
    if carry is not None:
        observations = [carry.moved(each) for each in observations]
        at_trials = carry.prior_of_trials(prior)
    fit = fit_observations(observations, at_trials)
    assert fit is not None
    if carry is not None:
        fit = carry.to_target(fit, prior)
    others = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    for name in BY_FIT:
        del others[name]
    return recipe_of(fit, recipe.law.law, recipe.reference, **others)


def stored_recipes(tasks: Iterable[str]) -> Iterator[tuple[str, str, Recipe]]:
    """Every recipe of these tasks, with its task and configuration."""
    for task in tasks:
        for config in CONFIGS:
            for path in paths_of(task, config):
                yield task, config, Recipe.load(path)


def rates_by_fit(
    done: Losses, with_full: bool, tasks: Iterable[str] = STUDY
) -> list[Rated]:
    """The rates of these tasks' recipes, fitted again, at the ranks that the sweep has.

    Args:
        done: the runs of the sweep.
        with_full: whether the recipes' runs of full finetuning count.
        tasks: the tasks.
    """
    rates = []
    for task, config, recipe in stored_recipes(tasks):
        rates += rates_of(task, config, refitted(recipe, with_full))
    return [r for r in rates if r.rank in ranks_in(done, r.task, r.config)]


def rates_of(task: str, config: str, recipe: Recipe) -> list[Rated]:
    """The recipe's rates at all ranks of the task's sweep."""
    finished = best_finished(recipe)
    rates = []
    for rank in get_domain(task).ranks_swept:
        x = math.log2(rate_of(recipe, config, rank)[0])
        rates.append(Rated(task, config, rank, x, finished.get(rank)))
    return rates


def best_finished(recipe: Recipe) -> dict[int, float]:
    """log2 of the rate of each rank's best run that neither diverged nor was pruned."""
    columns = {name: np.asarray(values) for name, values in recipe.tensors.items()}
    ended = ~(columns["diverged"] | columns["pruned"])
    best: dict[int, float] = {}
    for rank in set(columns["rank"][ended].tolist()):
        chosen = ended & (columns["rank"] == rank)
        at = int(np.argmin(columns["value"][chosen]))
        best[rank] = math.log2(float(columns["own_lr"][chosen][at]))
    return best


# --- a divergence and the cliff ---------------------------------------------------------------------------------------


@contextmanager
def repeating() -> Iterator[None]:
    """Run divergences near the best run again, and take back those that the other seed refutes."""
    plain_search = Schedule._search
    plain_propose = BracketSampler._propose
    plain_scored = Trials.scored

    def scored(trials: Trials) -> list[tuple[TrialRecord, Observation]]:
        pairs = plain_scored(trials)
        bad = diverged([observation for _, observation in pairs])
        well = [
            trial for (trial, _), is_lost in zip(pairs, bad, strict=True) if not is_lost
        ]
        return [
            pair
            for pair, is_lost in zip(pairs, bad, strict=True)
            if not (is_lost and is_repeated(pair[0], well))
        ]

    def search(schedule: Schedule, trials: Trials) -> Setting:
        for trial in contested(trials):
            others = [seed for seed in schedule.seeds if seed != trial.seed]
            if others:
                return Setting(trial.rank, others[0])
        return plain_search(schedule, trials)

    def propose(
        sampler: BracketSampler, trial: TrialRecord, low: float, high: float
    ) -> float:
        trials = sampler._calibration.trials()
        others = Trials(each for each in trials if each.number != trial.number)
        for each in contested(others.at(trial.rank)):
            if each.seed != trial.seed and each.x is not None and trial.rank:
                return each.x
        return plain_propose(sampler, trial, low, high)

    with (
        patch.object(Trials, "scored", scored),
        patch.object(Schedule, "_search", search),
        patch.object(BracketSampler, "_propose", propose),
    ):
        yield


def contested(trials: Trials) -> list[TrialRecord]:
    """The divergences near the best finished run of their rank that were not run again yet."""
    lost_numbers = trials.diverged()
    near = []
    for trial, _ in trials.scored():
        if trial.number not in lost_numbers or is_repeated(trial, trials):
            continue
        of_rank = trials.at(trial.rank).scored()
        ended = [run for each, run in of_rank if each.number not in lost_numbers]
        best = min(ended, key=lambda run: run.value, default=None)
        if best is not None and 0.0 < observed(trial) - best.x <= NEAR:
            near.append(trial)
    return near


def is_repeated(trial: TrialRecord, others: Iterable[TrialRecord]) -> bool:
    """Whether one of them has the trial's rank and rate, and another seed."""
    return any(
        other.rank == trial.rank
        and other.seed != trial.seed
        and other.x is not None
        and abs(other.x - observed(trial)) < SAME
        for other in others
    )


def observed(trial: TrialRecord) -> float:
    assert trial.x is not None
    return trial.x


@main.command("search")
@click.option("--workers", default=2, show_default=True)
def search_command(workers: int) -> None:
    """Run the searches that are not on file."""
    asked = [Job(*job) for job in product(TASKS, SETTINGS, SEEDS, (False, True))]
    todo = [job for job in asked if job not in searched()]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for row in pool.map(run, todo):
            with STORE.open("a") as store:
                store.write(json.dumps(row) + "\n")
            click.echo(f"{row['job']}: {row['trials']} runs, {row['steps']} steps")


def run(job: Job) -> dict[str, Any]:
    """Search as make_recipes.py does, with the rule or without."""
    with repeating() if job.repeat else nullcontext():
        recipe = search_recipe(
            get_domain(job.task),
            job.config,
            SHARE,
            job.seed,
            [],
            WARMUP,
            full_trials=FULL_TRIALS,
        )
    return {
        "job": job,
        "commit": machine(1)["commit"],
        "trials": len(recipe.tensors["steps"]),
        "steps": int(recipe.tensors["steps"].sum()),
        "rates": rates_of(job.task, job.config, recipe),
    }


def searched() -> dict[Job, dict[str, Any]]:
    """The searches on file."""
    if not STORE.exists():
        return {}
    rows = map(json.loads, STORE.read_text().splitlines())
    return {Job(*row["job"]): row for row in rows}


# --- the table --------------------------------------------------------------------------------------------------------


def regrets(done: Losses, rates: Iterable[Rated], capped: bool = False) -> list[float]:
    """What each rate loses, by the study's sweep."""
    shares = []
    for rate in rates:
        at = (rate.task, rate.config, rate.rank)
        x = rate.x
        if capped and rate.finished is not None:
            x = min(x, rate.finished + HIGHEST)
        shares.append(lost(done, at, at, x))
    return shares


def lowest_ranks(rates: Iterable[Rated]) -> list[Rated]:
    """The rates at their task's lowest rank."""
    return [r for r in rates if r.rank == get_domain(r.task).ranks_swept[0]]


@main.command()
def table() -> None:
    """Write results/couplings.md."""
    done = sweeps()
    write_explained(
        "couplings",
        "Two couplings of the fit",
        (__doc__ or "").partition("\n\n")[2],
        block("Apart", HEADS, list(apart_rows(done))),
        block("Repeat and cap", HEADS, list(cliff_rows(done))),
        block("The searches", SEARCH_HEADS, list(search_rows(done))),
        f"Searches: commit {', '.join(sorted({row['commit'] for row in searched().values()}))}.",
        made_on(machine(1)),
    )


HEADS = (
    "rule",
    "where",
    "rates",
    "regret before, %: mean / 95th percentile / share above 5 %",
    "after",
)
SEARCH_HEADS = (
    "task",
    "configuration",
    "seed",
    "as it is, %",
    "capped",
    "repeated",
    "both",
    "steps",
)


def compared(
    rule: str, before: Sequence[Any], after: Sequence[Any], where: str
) -> list[str]:
    """A row: the scores of the same rates before and after."""
    scores = [score(each).words(2) for each in (before, after)]
    return [rule, where, str(len(before)), *scores]


def apart_rows(done: Losses) -> Iterator[list[str]]:
    """Both fits of every recipe, over all configurations and in each."""
    together = rates_by_fit(done, with_full=True)
    apart = rates_by_fit(done, with_full=False)
    pairs = regrets(done, together), regrets(done, apart)
    yield compared("apart", *pairs, "all ranks")
    lowest = [rate in lowest_ranks(together) for rate in together]
    yield compared(
        "apart", *(list(compress(each, lowest)) for each in pairs), "lowest rank"
    )
    for config in CONFIGS:
        within = [rate.config == config for rate in together]
        yield compared(
            "apart", *(list(compress(each, within)) for each in pairs), config
        )


def cliff_rows(done: Losses) -> Iterator[list[str]]:
    """Each rule, alone and together, at the lowest rank and over all ranks."""
    rules = {
        "cap": (False, True),
        "repeat": (True, False),
        "repeat and cap": (True, True),
    }
    for rule, (repeat, capped) in rules.items():
        for where, chosen in (("lowest rank", lowest_ranks), ("all ranks", list)):
            before = regrets(done, chosen(rates_on_file(repeat=False)))
            after = regrets(done, chosen(rates_on_file(repeat)), capped)
            yield compared(rule, before, after, where)


def rates_on_file(repeat: bool) -> list[Rated]:
    """The rates of the finished pairs of searches, those with the rule or those without."""
    rows = searched()
    rates = []
    for job, row in rows.items():
        if job.repeat == repeat and job._replace(repeat=not repeat) in rows:
            rates += [Rated(*rate) for rate in row["rates"]]
    return rates


def search_rows(done: Losses) -> Iterator[list[str]]:
    """What each search loses at its lowest rank."""
    rows = searched()
    for job, row in rows.items():
        with_rule = rows.get(job._replace(repeat=True))
        if job.repeat or with_rule is None:
            continue
        cells = []
        for each in (row, with_rule):
            lowest = lowest_ranks([Rated(*rate) for rate in each["rates"]])
            cells += [*regrets(done, lowest), *regrets(done, lowest, capped=True)]
        steps = f"{row['steps']}, {with_rule['steps']}"
        yield [job.task, job.config, str(job.seed), *map(percent, cells), steps]


if __name__ == "__main__":
    main()
