"""How much faster are two workers of one thread than one? The same calibration, whole commands, in turn.

    python benchmarks/calibration/workers.py     # results/workers.json and .md, eight minutes a round on two idle cores

Trials of image generation, 100 steps each, at ranks 4 and 64, with a warm-up that forbids pruning; one that diverges
ends early. The time is of `rankaware calibrate` from its start to its end: imports, journal and recipe included, and
the second worker's idle end where the last trial is the first one's. Two workers try other rates than one, so that how
many runs diverge differs too: the ratio scatters. Each round runs both, in changing order, on a fresh journal.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from recording import machine, record
from study.configurations import ADAMW
from study.domains import get_domain
from study.training import shape, trained

import rankaware_optim as ra

DOMAIN, TRIALS, BAR = "image_generation", (16, 32), 1.8
RATES = "0.0005,0.06"


def train(trial: ra.Trial) -> Iterator[float]:
    """What both calibrate: a user's loop, and no step is skipped."""
    domain = get_domain(DOMAIN)
    model = domain.build(trial.rank, float(trial.rank), "A", trial.seed)
    opt = trial.optimizer(model, **ADAMW)
    return trained(domain, model, opt, trial.seed, lambda step: shape(step, domain.steps, 0.3))


@click.command()
@click.option("--rounds", default=1, show_default=True)
def main(rounds: int) -> None:
    """Measure, print, and write the result; exit status 1 where the bar is missed at the larger number of trials."""
    get_domain(DOMAIN).warm()
    on, rows = machine(1), []
    for number in range(rounds):
        for trials in TRIALS:
            seconds = {workers: timed(workers, trials) for workers in ((1, 2) if number % 2 else (2, 1))}
            rows.append(row(trials, seconds[1], seconds[2]))
    record("workers", "Two workers of one thread against one", rows, on, (__doc__ or "").split("\n\n")[::2])
    sys.exit(rows[-1]["ratio"] < BAR)


def row(trials: int, one: float, two: float) -> dict[str, Any]:
    return {"trials": trials, "one, s": one, "two, s": two, "ratio": one / two, f"≥ {BAR}": one / two >= BAR}


def timed(workers: int, trials: int) -> float:
    """Seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"ranks": "4,64", "steps": get_domain(DOMAIN).steps, "trials": trials, "lr-range": RATES, "warmup": 1}
        named = [f"--{key}={value}" for key, value in options.items()]
        command = ["-m", "rankaware_optim", "calibrate", "calibration.workers:train", "-o", f"{folder}/r.toml", *named]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *command, f"--workers={workers}", "--threads=1"],
            check=True, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
