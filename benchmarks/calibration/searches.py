"""Searches that train, whose steps are counted, and a calibration by the package."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from study.configurations import ADAMW, built
from study.domains import Domain
from study.grids import FULL
from study.training import shape, trained

import rankaware_optim as ra


@dataclass
class Spent:
    """What a search trains: the steps of all its runs."""

    steps: int = 0


def counted(run: Generator[Any, None, Any], spent: Spent) -> Generator[Any, None, Any]:
    """The same run; its steps are counted, also where it is stopped."""
    while True:
        try:
            value = next(run)
        except StopIteration as stop:
            return stop.value
        spent.steps += 1
        yield value


def scored(run: Generator[Any, None, float]) -> float:
    """A run's held-out loss, infinite where it is not finite."""
    while True:
        try:
            next(run)
        except StopIteration as stop:
            return float(stop.value) if math.isfinite(stop.value) else math.inf


# --- a calibration ----------------------------------------------------------------------------------------------------


def recipe_of(
    domain: Domain, config: str, seed: int, spent: Spent, **options: Any
) -> ra.Recipe:
    """A domain's recipe in a configuration, by these options of `ra.calibrate`; `seed` picks the seeds of its runs."""

    warmup = options.pop("warmup")

    def train(trial: ra.Trial) -> Generator[Any, None, Any]:
        return counted(loop(trial), spent)

    def loop(trial: ra.Trial) -> Generator[float, None, float]:
        model = built(domain, config, trial.rank or FULL, trial.seed)
        opt = trial.optimizer(model, rates=domain.head_rates, **ADAMW)
        own = replace(domain, steps=trial.steps)
        schedule = partial(shape, steps=trial.steps, warmup=warmup)
        return (yield from trained(own, model, opt, trial.seed, schedule))

    return ra.calibrate(
        train,
        torch.optim.AdamW,
        seeds=seeds_of(seed),
        batch=domain.batch,
        progress=False,
        **options,
    )


def seeds_of(search: int) -> tuple[int, int]:
    """The seeds of a search's runs, which no sweep of the study has."""
    return 10 + 2 * search, 11 + 2 * search
