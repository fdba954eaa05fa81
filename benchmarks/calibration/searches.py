"""Searches that train: our calibration by several plans, Optuna's TPE, an LR range test.

Each names a rate for every rank and for full finetuning, or for the one rank that it tuned, and keeps every run that it
made.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from calibration.plain import BY_RANK, TPE, WAYS, Task
from study.configurations import ADAMW, CONFIGS, built, optimizer
from study.domains import Domain, get_domain
from study.grids import FULL, Job
from study.training import shape, trained

import rankaware_optim as ra
from rankaware_optim.calibration import seeded

WARMUP, RATES_SWEPT = 0.3, 9
LOW, HIGH = -15.0, -2.0  # log2 of the rates that TPE and the range test know of
SMOOTHED = 0.9  # the range test's moving average of losses
Rates = dict[int, list[float]]  # lr, low, high by rank
Spent = list["Run"]


class Run(NamedTuple):
    """A run of a search.

    x: log2 of the base rate, None where it varied. loss: held out, None where the run diverged or was stopped.
    """

    rank: int
    x: float | None
    seed: int
    steps: int
    seconds: float
    loss: float | None


class Search(NamedTuple):
    """One search: where, by which plan, its share of the sweep's cost, its seed."""

    domain: str
    config: str
    plan: str
    share: float
    seed: int


def searched(of: Search) -> dict[str, Any]:
    """Search as a user would. Returns a row: the search, every rate, every run, and the time spent beside training."""
    domain, spent = get_domain(of.domain), Spent()
    start = time.perf_counter()
    rates = PLANS[of.plan](of, domain, spent)
    whole, training = time.perf_counter() - start, sum(run.seconds for run in spent)
    return {
        **of._asdict(),
        "rates": rates,
        "runs": spent,
        "beside_training": (whole - training) / training,
    }


def by_arm(runs: Iterable[Sequence[Any]]) -> dict[int, tuple[int, float]]:
    """Steps and seconds by rank, of the runs of a row on file."""
    found: dict[int, tuple[int, float]] = {}
    for run in (Run(*each) for each in runs):
        steps, seconds = found.get(run.rank, (0, 0.0))
        found[run.rank] = steps + run.steps, seconds + run.seconds
    return found


def clocked(
    run: Generator[Any, None, Any],
    spent: Spent,
    rank: int,
    seed: int,
    x: Callable[[], float | None],
) -> Generator[Any, None, Any]:
    """The same run; what it took and its loss are appended to `spent` at its end, however it ends."""
    steps, seconds, loss = 0, 0.0, None
    try:
        while True:
            start = time.perf_counter()
            try:
                value = next(run)
            except StopIteration as stop:
                loss = stop.value
                return loss
            finally:
                seconds += time.perf_counter() - start
            steps += 1
            yield value
    finally:
        at, finite = x(), loss is not None and math.isfinite(loss)
        rate = None if at is None else round(at, 4)
        spent.append(
            Run(rank, rate, seed, steps, round(seconds, 3), loss if finite else None)
        )


# --- ours -----------------------------------------------------------------------------------------------------------


def calibrated(**options: Any) -> Callable[[Search, Domain, Spent], Rates]:
    """`ra.calibrate` at the lowest and the highest rank within a budget; the recipe's rates at all."""

    def run(of: Search, domain: Domain, spent: Spent) -> Rates:
        recipe = recipe_of(domain, of.config, of.share, of.seed, spent, **options)
        return {
            rank: rate_of(recipe, of.config, rank)
            for rank in (*domain.ranks_swept, FULL)
        }

    return run


def recipe_of(
    domain: Domain,
    config: str,
    share: float,
    seed: int,
    spent: Spent,
    warmup: float = WARMUP,
    **options: Any,
) -> ra.Recipe:
    """A domain's recipe in a configuration, at a share of its sweep's cost.

    It tries the lowest and the highest rank that are swept, as the docs advise. `options` of `ra.calibrate` win.
    """

    def train(trial: ra.Trial) -> Generator[Any, None, Any]:
        return clocked(
            loop(trial),
            spent,
            trial.rank or FULL,
            trial.seed,
            lambda: trial.lr and math.log2(trial.lr),
        )

    def loop(trial: ra.Trial) -> Generator[float, None, float]:
        model = built(domain, config, trial.rank or FULL, trial.seed)
        opt = trial.optimizer(model, rates=domain.head_rates, **ADAMW)
        own = replace(domain, steps=trial.steps)
        return (
            yield from trained(
                own,
                model,
                opt,
                trial.seed,
                partial(shape, steps=trial.steps, warmup=warmup),
            )
        )

    ends = (domain.ranks_swept[0], domain.ranks_swept[-1])
    planned = {"ranks": ends, "steps": domain.steps, "budget": budget_of(share, domain)}
    return ra.calibrate(
        train,
        torch.optim.AdamW,
        seeds=(10 + 2 * seed, 11 + 2 * seed),
        seed=seed,
        batch=domain.batch,
        warmup=warmup,
        progress=False,
        **{**planned, **options},
    )


def budget_of(share: float, domain: Domain) -> int:
    """Training steps: a share of nine rates at every rank and in full, one seed."""
    return round(share * RATES_SWEPT * (len(domain.ranks_swept) + 1) * domain.steps)


def rate_of(recipe: ra.Recipe, config: str, rank: int) -> list[float]:
    """The rate and its band at a rank of the configuration, or for full finetuning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ra.RankAwareWarning)
        rate = (
            recipe.at(method="full")
            if rank == FULL
            else recipe.at(rank, alpha=CONFIGS[config].alpha(rank))
        )
    return [rate.lr, rate.low, rate.high]


# --- without a calibration ------------------------------------------------------------------------------------------


def by_way(name: str) -> Callable[[Search, Domain, Spent], Rates]:
    """The rates of a way that a user would write with Optuna, at the ranks that it tunes."""

    def run(of: Search, domain: Domain, spent: Spent) -> Rates:
        seed = 10 + 2 * of.seed

        def train(rank: int, seed: int, x: float) -> float:
            with seeded(seed):
                model = built(domain, of.config, rank, seed)
                job = Job(domain.name, of.config, rank, x, seed)
                opt = optimizer(model, domain, job)
                shaped = partial(shape, steps=domain.steps, warmup=WARMUP)
                run = trained(domain, model, opt, seed, shaped)
                return scored(clocked(run, spent, rank, seed, lambda: x))

        spans = dict.fromkeys((*domain.ranks_swept, FULL), (LOW, HIGH))
        trials = max(1, budget_of(of.share, domain) // domain.steps)
        rates = WAYS[name](Task(train, spans, (seed,), of.seed, trials))
        return {rank: [2.0**x] * 3 for rank, x in rates.items()}

    return run


def scored(run: Generator[Any, None, float]) -> float:
    """A run's held-out loss, infinite where it is not finite."""
    while True:
        try:
            next(run)
        except StopIteration as stop:
            return float(stop.value) if math.isfinite(stop.value) else math.inf


def by_range_test(of: Search, domain: Domain, spent: Spent) -> Rates:
    """Smith's test at every arm: the rate rises from 2^-15 to 2^-2 in one run; taken where the loss falls fastest."""
    return {
        rank: [2.0 ** steepest(of, domain, spent, rank)] * 3
        for rank in (*domain.ranks_swept, FULL)
    }


def steepest(of: Search, domain: Domain, spent: Spent, rank: int) -> float:
    """log2 of the rate at the end of the octave over which the smoothed loss falls most, before its lowest point.

    Over an octave, and not before ten values are averaged: step by step the noise of the first few decides.
    """
    seed, octaves = 10 + 2 * of.seed, (HIGH - LOW) / domain.steps
    model = built(domain, of.config, rank, seed)
    opt = optimizer(model, domain, Job(domain.name, of.config, rank, LOW, seed))
    run = trained(domain, model, opt, seed, lambda step: 2.0 ** (octaves * step))
    rising = clocked(run, spent, rank, seed, lambda: None)
    losses, average = [], 0.0
    for step, loss in enumerate(rising, 1):
        average = SMOOTHED * average + (1 - SMOOTHED) * loss
        losses.append(average / (1 - SMOOTHED**step))
        if not losses[-1] < 4 * losses[0]:
            break
    rising.close()
    octave, lowest = round(1 / octaves), losses.index(min(losses))
    ends = range(10 + octave, max(lowest + 1, 11 + octave))
    return LOW + octaves * min(
        ends, key=lambda i: losses[min(i, len(losses) - 1)] - losses[i - octave]
    )


LORA, WITH_FULL = "LoRA trials", "LoRA and three full trials"
RANGE_TEST = "LR range test"
PLANS: dict[str, Callable[[Search, Domain, Spent], Rates]] = {
    LORA: calibrated(),
    WITH_FULL: calibrated(full_trials=3),
    TPE: by_way(TPE),
    RANGE_TEST: by_range_test,
    BY_RANK: by_way(BY_RANK),
}
