"""What a user would write with Optuna instead of a calibration, at the price of its runs.

A way is given runs, and returns log2 of its rate at the ranks that it tuned. From one rank the default law moves it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from study.configurations import TUNED
from study.moving import by_law

from rankaware_optim.calibration import TRIALS_PER_RANK
from rankaware_optim.laws import DEFAULT_LAW, get_law

TRIALS = 2 * TRIALS_PER_RANK  # of a calibration at two ranks
# (rank, seed, log2 of the rate) -> the loss, infinite where the run diverged
Run = Callable[[int, int, float], float]
Rates = dict[int, float]


@dataclass(frozen=True)
class Task:
    """What is tuned.

    Args:
        run: trains.
        spans: log2 of the lowest and the highest rate to try, by rank; `FULL` is full finetuning.
        seeds: those of the runs, in turn.
        seed: of the sampler.
    """

    run: Run
    spans: Mapping[int, tuple[float, float]]
    seeds: Sequence[int]
    seed: int


def by_tpe(task: Task, *ranks: int) -> Rates:
    """log2 of TPE's best rate at each of these ranks, among which it chooses.

    A rank that it never chose gets the best rate of all.
    """
    lows, highs = zip(*(task.spans[rank] for rank in ranks), strict=True)

    def score(trial: optuna.Trial) -> float:
        rank = trial.suggest_categorical("rank", ranks)
        x = trial.suggest_float("log2_lr", min(lows), max(highs))
        return task.run(rank, task.seeds[trial.number % len(task.seeds)], x)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=task.seed))
    study.optimize(score, n_trials=TRIALS)
    best = dict.fromkeys(ranks, study.best_params["log2_lr"])
    for trial in sorted(study.trials, key=lambda trial: trial.value, reverse=True):
        best[trial.params["rank"]] = trial.params["log2_lr"]  # the lowest loss is last
    return best


def by_grid(task: Task, rank: int) -> Rates:
    """log2 of the best of rates an octave apart, in the mean over the seeds."""
    low, high = task.spans[rank]
    rates = [low + 0.5 + octave for octave in range(round(high - low))]
    means = {
        x: statistics.fmean(task.run(rank, seed, x) for seed in task.seeds)
        for x in rates
    }
    return {rank: min(means, key=means.__getitem__)}


def by_tpe_everywhere(task: Task) -> Rates:
    rates: Rates = {}
    for rank in task.spans:
        rates |= by_tpe(task, rank)
    return rates


def moved(rates: Rates, domain: str, config: str, ranks: Sequence[int]) -> Rates:
    """log2 of the rates at all ranks: where one was tuned, as the default law moves its rate."""
    if len(rates) > 1:
        return rates
    shift = by_law(domain, config, get_law(DEFAULT_LAW))
    ((tuned, x),) = rates.items()
    return {rank: x + shift(tuned, rank) for rank in ranks}


TPE, GRID = "TPE at rank 16, the law", "8 rates on 2 seeds at rank 16, the law"
BY_RANK, EVERY_RANK = "TPE, the rank a parameter", "TPE at every rank"
WAYS: Mapping[str, Callable[[Task], Rates]] = {
    TPE: lambda task: by_tpe(task, TUNED),
    GRID: lambda task: by_grid(task, TUNED),
    BY_RANK: lambda task: by_tpe(task, *task.spans),
    EVERY_RANK: by_tpe_everywhere,  # six times the runs
}
