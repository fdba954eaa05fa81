"""Real searches that compare two readings of the same four trials: the fit with its margin, and the parabola.

    python benchmarks/calibration/search_runs.py    # resumable: results/search.jsonl

The rule is at the end of `rules.md`. Audio and time series, trials of 100 steps for a run of 400, at rank 16 and in full
finetuning, three search seeds and two starts. `calibration/search_rules.py` reads the searches.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from calibration.make_recipes import rate_of
from calibration.searches import seeds_of
from laws.suggested import suggested
from recording import RESULTS, commit
from study.configurations import ADAMW, CLIP, TUNED, built
from study.domains import get_domain
from study.grids import FULL
from study.longer import AT_A
from study.training import shape, trained

import rankaware_optim as ra

RESTS_ON = ()
STORE = RESULTS / "search.jsonl"
TASKS = ("time_series", "audio")
SEEDS, STARTS = (5, 6, 7), (-1.0, 1.0)
STEPS, TARGET = 100, 400
HALF_RANGE = 4.0  # octaves to either side of the start, as in the package
SCORED = {TUNED: (TUNED, 128, FULL), FULL: (FULL,)}
BY_FIT, BY_PARABOLA = "by the fit", "by the parabola"


class Search(NamedTuple):
    """A search: its task, the rank that it tunes at, log2 of its start above the suggested rate, and its seed."""

    task: str
    tuned: int
    start: float
    seed: int


def wanted() -> Iterator[Search]:
    for seed in SEEDS:
        for task in TASKS:
            for tuned in SCORED:
                yield from (Search(task, tuned, start, seed) for start in STARTS)


def recipe_of(ask: Search, known: dict[tuple[float, int], list[float]]) -> ra.Recipe:
    """The recipe of a search. known: the losses and the score of trials that ran before."""
    domain, config = get_domain(ask.task), "full" if ask.tuned == FULL else AT_A

    def train(trial: ra.Trial) -> Generator[float, None, float]:
        model = built(domain, config, ask.tuned, trial.seed)
        opt = trial.optimizer(model, rates=domain.head_rates, **ADAMW)
        assert trial.lr is not None
        losses = known.setdefault((round(math.log2(trial.lr), 6), trial.seed), [])
        if len(losses) <= trial.steps:
            losses.clear()
            own = replace(domain, steps=trial.steps)
            schedule = partial(shape, steps=trial.steps)
            run = trained(own, model, opt, trial.seed, schedule, CLIP)
            losses.append((yield from noted(run, losses)))
            return losses[-1]
        return (yield from replayed(losses, model, opt, trial.steps))

    middle = suggested(ask.task, config, ask.tuned) + ask.start
    ends = (2.0 ** (middle - HALF_RANGE), 2.0 ** (middle + HALF_RANGE))
    options: dict[str, Any] = {"steps": STEPS, "target_steps": TARGET, "trials": 4}
    options |= {"seeds": seeds_of(ask.seed), "lr_range": ends, "batch": domain.batch}
    return ra.calibrate(
        train, "adamw", ranks=(ask.tuned or None,), **options, progress=False
    )


def noted(run: Generator[float, None, float], losses: list[float]) -> Any:
    """The same run, whose losses are noted."""
    while True:
        try:
            losses.append(next(run))
        except StopIteration as end:
            return end.value
        yield losses[-1]


def replayed(losses: list[float], model: Any, opt: Any, steps: int) -> Any:
    """A run that is known: its losses are yielded, and its weights move as a calibration expects."""
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, partial(shape, steps=steps))
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    for loss in losses[:steps]:
        opt.step()
        schedule.step()
        yield loss
    return losses[steps]


def searched(ask: Search) -> dict[str, Any]:
    """The rates of a search by both readings: log2 of the rate and of its interval's ends, by rank."""
    known: dict[tuple[float, int], list[float]] = {}
    as_before = mock.patch(
        "rankaware_optim.calibration._calibration.is_few", return_value=False
    )
    recipes = {BY_PARABOLA: recipe_of(ask, known)}
    with as_before:
        recipes[BY_FIT] = recipe_of(ask, known)
    return {
        name: {rank: rate_of(recipe, AT_A, rank) for rank in SCORED[ask.tuned]}
        for name, recipe in recipes.items()
    }


def on_file() -> dict[Search, dict[str, dict[int, list[float]]]]:
    found = {}
    for line in STORE.read_text().splitlines() if STORE.exists() else ():
        row = json.loads(line)
        ask = Search(*(row[name] for name in Search._fields))
        found[ask] = {
            name: {int(rank): rate for rank, rate in row[name].items()}
            for name in (BY_FIT, BY_PARABOLA)
        }
    return found


def main() -> None:
    """Run what is missing, each search appended at its end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = on_file()
    for ask in wanted():
        if ask not in done:
            rates = searched(ask)
            row = {**ask._asdict(), **rates, "commit": commit()}
            with STORE.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*ask, rates, flush=True)


if __name__ == "__main__":
    main()
