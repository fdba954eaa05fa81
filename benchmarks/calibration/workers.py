"""How much faster are two workers of one thread than one, and how do two on Ray compare? The same calibration, timed.

    python benchmarks/calibration/workers.py     # results/workers.json and .md, 20 minutes a round on idle cores
    python benchmarks/calibration/workers.py --trials 4    # a quick look, not written

Trials of image generation have 100 steps each, at ranks 4 and 64, with a warm-up that forbids pruning. A trial that
diverges ends early. The time is that of `rankaware calibrate` from start to end. It includes imports, journal and
recipe, and the time in which one worker is idle while the other ends the last trial. Two workers try other rates than
one. So the number of diverged runs differs too, and the ratio scatters. Each round runs all commands in changing order,
each on a fresh journal. With `--ray local`, the two workers are tasks of a Ray cluster that the command starts on this
machine. The start is timed by the same command once more, when no trial is left to run. It is subtracted from both
times where two workers on Ray are compared with two without.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click
from recording import machine, record, shown
from study.configurations import ADAMW
from study.domains import get_domain
from study.training import shape, trained

import rankaware_optim as ra

RESTS_ON = ()  # times: made again at a release
DOMAIN, TRIALS = "image_generation", (16, 32)
# bars: one worker's time over two workers', at least; Ray's over theirs, less starts, at most
TWICE, RAY = (
    1.85,
    1.05,
)
RATES = "0.0005,0.06"
ARMS = {
    "one": ["--workers=1", "--threads=1"],
    "two": ["--workers=2", "--threads=1"],
    "Ray": ["--workers=2", "--ray=local"],
}


class Timed(NamedTuple):
    """Seconds of the whole command, and of the same command once more when nothing is left to run."""

    whole: float
    start: float


def train(trial: ra.Trial) -> Iterator[float]:
    """The training loop that every command calibrates. It runs every step."""
    domain = get_domain(DOMAIN)
    model = domain.build(trial.rank, float(trial.rank), "A", trial.seed)
    opt = trial.optimizer(model, **ADAMW)
    return trained(
        domain, model, opt, trial.seed, lambda step: shape(step, domain.steps, 0.3)
    )


@click.command()
@click.option("--rounds", default=1, show_default=True)
@click.option(
    "--trials",
    type=int,
    help="One number of trials instead of both: a look, not written.",
)
def main(rounds: int, trials: int | None) -> None:
    """Measure, print the table, and write it. Exit with status 1 if a bar is missed at the larger number of trials."""
    get_domain(DOMAIN).warm()
    on, rows = {**machine(1), "ray": version("ray")}, []
    for number in range(rounds):
        for count in (trials,) if trials else TRIALS:
            order = list(ARMS) if number % 2 else list(ARMS)[::-1]
            rows.append(row(count, {name: timed(ARMS[name], count) for name in order}))
    if trials:
        click.echo(
            "\n".join(f"{key}: {shown(value)}" for key, value in rows[-1].items())
        )
        return
    record(
        "workers",
        "Two workers of one thread against one, and on Ray",
        rows,
        on,
        (__doc__ or "").split("\n\n")[::2],
    )
    sys.exit(not all(value for value in rows[-1].values() if isinstance(value, bool)))


def row(trials: int, took: dict[str, Timed]) -> dict[str, Any]:
    """A row of the table."""
    one, two, ray = (took[name] for name in ARMS)
    ratio, beside = (
        one.whole / two.whole,
        (ray.whole - ray.start) / (two.whole - two.start),
    )
    return {
        "trials": trials,
        "one, s": one.whole,
        "two, s": two.whole,
        "one / two": ratio,
        f"≥ {TWICE}": ratio >= TWICE,
        "two on Ray, s": ray.whole,
        "two start in, s": two.start,
        "on Ray, s": ray.start,
        "Ray / two beside it": beside,
        f"≤ {RAY}": beside <= RAY,
    }


def timed(options: list[str], trials: int) -> Timed:
    """Time the command, and the same command once more."""
    with tempfile.TemporaryDirectory() as folder:
        steps = get_domain(DOMAIN).steps
        given = {
            "ranks": "4,64",
            "steps": steps,
            "trials": trials,
            "lr-range": RATES,
            "warmup": 1,
        }
        named = [f"--{key}={value}" for key, value in given.items()]
        command = [
            "-m",
            "rankaware_optim",
            "calibrate",
            "calibration.workers:train",
            "-o",
            f"{folder}/r.toml",
        ]

        def once() -> float:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *command, *named, *options],
                check=True, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
            )  # fmt: skip
            return time.perf_counter() - start

        return Timed(once(), once())


if __name__ == "__main__":
    main()
