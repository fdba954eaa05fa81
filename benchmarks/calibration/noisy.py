"""Calibrations of runs whose batches are noisy: how often a search fails, and what its rates lose.

    python benchmarks/calibration/noisy.py    # results/noisy.json and .md, ten minutes

Runs are made up and cost nothing. A curve begins at 1 and falls by at most `GAIN`. At u octaves above a rank's best
rate, and at share p of its steps, a run below the cliff has learned

    GAIN (1 - exp(-5 p 2^u)) (1 - 0.08 max(u, 0)^2)

Beyond `CLIFF` octaves the first step loses `GAIN`, and the curve stays there, as a policy's that has collapsed. A value
has noise, half of whose variance is that of the seed's batches. Best rates fall by half an octave per octave of rank,
and lie 4.6 octaves below, 1.6 below, or 1.4 above the first rate that a search tries at the highest rank. Each search
tries two ranks with 16 runs of 100 steps.

The rules that take noise into account are compared with the same search without them: `CLEAR` is 0, and a search none
of whose runs learned does not turn downwards. Regret is the share of the gain that the rates lose in runs without
noise, at the worse of the two ranks. It is 200 % beyond the cliff.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np
import torch
from made_up import Pair
from recording import machine, percent, record

import rankaware_optim as ra
from rankaware_optim.calibration import _search
from rankaware_optim.errors import CalibrationError
from rankaware_optim.fitting import _observations

RESTS_ON = ("search.adam", "calibration.adam")
RANKS, STEPS, TRIALS = (4, 64), 100, 16
# log2 of the best rate at the lowest rank; octaves above it; loss
BEST, CLIFF, GAIN = (
    -7.0,
    2.5,
    0.2,
)
# shares of the gain; octaves
NOISES, SHIFTS = (
    (0.0, 0.5, 1.0, 2.0, 4.0),
    (-3.0, 0.0, 3.0),
)


class Outcome(NamedTuple):
    """A search's end: regret, or None if it failed; runs below the cliff, and those of them taken for diverged."""

    regret: float | None
    below: int = 0
    lost: int = 0


@click.command()
@click.option(
    "--searches",
    default=20,
    show_default=True,
    help="Of each line and shift; fewer are a look, not written.",
)
def main(searches: int) -> None:
    """Search, print the table, and write it to the results."""
    torch.set_num_threads(1)
    rows = []
    for noise in NOISES:
        for rules, context in (("with", nullcontext), ("without", without)):
            with context():
                found = [
                    searched(noise, shift, seed)
                    for shift in SHIFTS
                    for seed in range(searches)
                ]
            rows.append(row_of(noise, rules, found))
            click.echo("  ".join(map(str, rows[-1].values())))
    if searches >= 20:
        notes = [
            f"{searches * len(SHIFTS)} searches a line. A failed search names its cause and has no regret."
        ]
        record("noisy", "Calibrations of noisy runs", rows, machine(1), notes)


@contextmanager
def without() -> Iterator[None]:
    """The search as if curves had no noise."""
    with ExitStack() as stack:
        for module in (_observations, _search):
            stack.enter_context(patch.object(module, "CLEAR", 0.0))
        stack.enter_context(patch.object(_search, "_UPWARDS", math.inf))
        yield


def searched(noise: float, shift: float, seed: int) -> Outcome:
    """Calibrate once, and score the rates of both ranks without noise."""
    tried: Counter[bool] = Counter()

    def train(trial: ra.Trial) -> Iterator[float]:
        group = trial.optimizer(Pair(trial.rank)).param_groups[0]
        u = octaves_above_best(
            group["lr"] * group["rank_multiplier"], trial.rank, shift
        )
        batches, own = (
            np.random.default_rng([seed, *key])
            for key in ((trial.seed,), (trial.seed, trial.number))
        )
        for step in range(trial.steps):
            drawn = math.sqrt(0.5) * (batches.standard_normal() + own.standard_normal())
            yield 1.0 - GAIN * (
                learned(u, step / trial.steps) * (step > 0) - noise * drawn
            )

    try:
        recipe = ra.calibrate(
            train,
            "adamw",
            ranks=RANKS,
            steps=STEPS,
            trials=TRIALS,
            seed=seed,
            progress=False,
        )
    except CalibrationError:
        return Outcome(None)
    runs = zip(
        recipe.tensors["own_lr"],
        recipe.tensors["rank"],
        recipe.tensors["diverged"],
        strict=True,
    )
    for lr, rank, diverged in runs:
        if octaves_above_best(lr, rank, shift) < CLIFF:
            tried[bool(diverged)] += 1
    most = max(learned(u, 1.0) for u in np.linspace(-1, 1, 201))
    ends = [
        learned(octaves_above_best(recipe.at(rank).lr, rank, shift), 1.0)
        for rank in RANKS
    ]
    return Outcome(1 - min(ends) / most, tried.total(), tried[True])


def octaves_above_best(lr: float, rank: int, shift: float) -> float:
    return math.log2(lr) - (BEST + shift - 0.5 * math.log2(rank / RANKS[0]))


def learned(u: float, p: float) -> float:
    """Share of the gain that a run has learned at share p of its steps; negative beyond the cliff."""
    if u > CLIFF:
        return -1.0
    return (1 - math.exp(-5 * p * 2.0**u)) * (1 - 0.08 * max(u, 0.0) ** 2)


def row_of(noise: float, rules: str, found: list[Outcome]) -> dict[str, Any]:
    regrets = [one.regret for one in found if one.regret is not None]
    below = sum(one.below for one in found)
    return {
        "noise / gain": noise,
        "rules": rules,
        "failed": f"{len(found) - len(regrets)} of {len(found)}",
        "taken for diverged": percent(sum(one.lost for one in found) / below)
        if below
        else "–",
        "regret, median": percent(float(np.median(regrets))),
        "regret, worst tenth": percent(float(np.quantile(regrets, 0.9))),
        "worst": percent(max(regrets)),
    }


if __name__ == "__main__":
    main()
