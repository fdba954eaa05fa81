"""How much do 16 and 64 workers gain? The package's planner with many workers, simulated on measured runs.

    python benchmarks/calibration/cluster_simulation.py            # results/cluster_simulation.json and .md
    python benchmarks/calibration/cluster_simulation.py --draws 1  # a quick look, not written

Every worker is the package's `Runner`, and all share one storage. Schedule, sampler, pruner, fit and the waiting for
other workers are real. Only training and the clock are replaced. A simulated run repeats the run of a shipped recipe
(Init[A], s = 1, real trainings of LoRA) whose rate is nearest, with its losses step by step. If that run diverged, the
simulated one does too. If it was pruned, the simulated one continues like the best run, at the distance in loss that
it had when it was pruned. The time of a step is drawn for every run from the times measured in
results/calibration_searches.jsonl. At ranks 4 and 64 these are the times at a domain's lowest and highest rank, in
units of the median at the lowest. They were measured on two cores with up to 25 other processes, which slowed some
runs down fourfold.

Speed-up is the time of one worker over that of many. In the last column every step takes its rank's median time. The
last round begins when the first worker finds nothing left to start, and is shown as a share of the whole time. Idle is
the share of the workers' time in which they had nothing to run. Octaves apart is the distance of the recipe's base rate
from that of one worker, who plans each run with all earlier runs known.

Left out are starting a worker, building the model, and the time of the fit and the storage. These do not grow with the
runs' length.
"""

from __future__ import annotations

import heapq
import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import click
import numpy as np
import optuna
import torch
from calibration.against_sweep_scores import on_file
from calibration.searches import by_arm
from made_up import Pair
from recording import RESULTS, machine, record, shown
from study.grids import FULL

import rankaware_optim as ra
from rankaware_optim.calibration._calibration import Calibration
from rankaware_optim.calibration._result import calibrated_recipe
from rankaware_optim.calibration._runner import Runner
from rankaware_optim.calibration._schedule import Options, Schedule
from rankaware_optim.calibration._search import BracketSampler, PairedPruner
from rankaware_optim.laws import PRIOR_LAW, get_law

RESTS_ON = ("search.adam",)
RECIPES = RESULTS.parents[1] / "recipes"
REPLAYED = (
    "efficientnet-lite0-digits", "image-generation-a", "language-a", "language-smollm2-a", "reinforcement-a",
    "text-classification-a", "vision-classification-a", "vision-language-a",
)  # fmt: skip
RANKS, SEEDS = (4, 64), (0, 1)
WORKERS, TRIALS = (1, 2, 4, 16, 64), (16, 64)
POLL = 5.0  # steps of virtual time per second that a worker waits for others, as if a run took at least 20 s
DRAWS = 5


# --- virtual time ---------------------------------------------------------------------------------------------------


class Clock:
    """Virtual time for threads that take turns. When a thread sleeps, the one that is due first runs."""

    def __init__(self) -> None:
        self.now, self._due, self._order = 0.0, [], count()

    def sleep(self, duration: float) -> None:
        """Let other threads run for `duration` of virtual time."""
        gate = threading.Event()
        heapq.heappush(self._due, (self.now + duration, next(self._order), gate))
        self.hand_over()
        gate.wait()

    def hand_over(self) -> None:
        """Start the thread that is due next. The calling thread must then wait or end."""
        if self._due:
            self.now, _, gate = heapq.heappop(self._due)
            gate.set()

    def run(self, works: list[Callable[[], None]]) -> None:
        """Run all works in threads from time 0, until every one has ended."""
        errors: list[BaseException] = []

        def enter(work: Callable[[], None], gate: threading.Event) -> None:
            gate.wait()
            try:
                work()
            except BaseException as error:
                errors.append(error)
            self.hand_over()

        threads = []
        for work in works:
            gate = threading.Event()
            heapq.heappush(self._due, (0.0, next(self._order), gate))
            threads.append(threading.Thread(target=enter, args=(work, gate)))
            threads[-1].start()
        self.hand_over()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


# --- measured runs --------------------------------------------------------------------------------------------------


class Replay:
    """The LoRA runs of a recipe, by octaves of their base rate from the first run's."""

    def __init__(self, name: str) -> None:
        tensors = ra.Recipe.load(RECIPES / f"{name}.toml").tensors
        lora = tensors["rank"] > 0
        x = np.log2(tensors["lr"][lora])
        self.x, self.lost = (x - x[0]).tolist(), tensors["diverged"][lora].tolist()
        self.curves = [
            curve[: np.isfinite(curve).sum()].tolist()
            for curve in tensors["curve"][lora]
        ]
        self.steps = tensors["curve"].shape[1]
        whole = [i for i, curve in enumerate(self.curves) if len(curve) == self.steps]
        self._best = self.curves[
            min(whole, key=lambda i: statistics.fmean(self.curves[i][-5:]))
        ]

    def values(self, x: float) -> list[float]:
        """The losses of the run whose rate is nearest to `x`, a pruned one continued to the last step."""
        near = min(range(len(self.x)), key=lambda i: abs(self.x[i] - x))
        curve = self.curves[near]
        if self.lost[near]:
            return [*curve, math.inf]
        behind = curve[-1] - self._best[len(curve) - 1]
        return [*curve, *(value + behind for value in self._best[len(curve) :])]


def step_times() -> dict[int, list[float]]:
    """Measured times of a step by rank in `RANKS`, one for each search and rank.

    They are the times at a domain's lowest and highest rank, in units of its median at the lowest.
    """
    taken: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in on_file():
        for rank, (steps, seconds) in by_arm(row["runs"]).items():
            if steps and rank != FULL:
                taken[row["domain"]][rank].append(seconds / steps)
    times: dict[int, list[float]] = {rank: [] for rank in RANKS}
    for own in taken.values():
        unit = statistics.median(own[min(own)])
        for rank, end in zip(RANKS, (min(own), max(own)), strict=True):
            times[rank] += [t / unit for t in own[end]]
    return times


# --- one calibration ------------------------------------------------------------------------------------------------


def simulated(
    replay: Replay, workers: int, trials: int, times: dict[int, list[float]], seed: int
) -> dict[str, float]:
    """Simulate one calibration by many workers.

    Args:
        replay: the measured runs.
        workers: how many workers.
        trials: how many trials.
        times: times of a step to draw from, by rank.
        seed: seed of the draw.

    Returns:
        The total time in steps, the shares of the last round and of idle time, log2 of the recipe's base rate, the mean
        length of a run as a share of the whole, and the trials that count.
    """
    schedule = Schedule(RANKS, SEEDS, replay.steps, trials=trials)
    calibration = Calibration(Options(torch.optim.AdamW, get_law(PRIOR_LAW), schedule))
    calibration.open(
        BracketSampler(calibration),
        PairedPruner(calibration),
        optuna.storages.InMemoryStorage(),
    )
    clock, rng = Clock(), np.random.default_rng([seed, trials])
    calibration.pause = lambda seconds: clock.sleep(POLL * seconds)  # type: ignore[method-assign]
    draws = {rank: iter(rng.choice(times[rank], 4 * trials).tolist()) for rank in RANKS}
    first: list[float] = []

    def train(trial: ra.Trial) -> Iterator[float]:
        trial.optimizer(Pair(trial.rank))
        first.append(x := math.log2(trial.lr))
        pace = next(draws[trial.rank])
        for value in replay.values(x - first[0]):
            clock.sleep(pace)
            yield value

    busy, idle_from = [0.0] * workers, [0.0] * workers

    def work(number: int) -> None:
        runner = Runner(calibration)
        while True:
            idle_from[number] = clock.now
            trial = runner.begin()
            if trial is None:
                return
            start = clock.now
            runner.one(trial, train, lambda *_: None)
            busy[number] += clock.now - start

    clock.run([partial(work, number) for number in range(workers)])
    ran = calibration.trials().counted()
    total = max(idle_from)
    return {
        "time": total,
        "last": (total - min(idle_from)) / total,
        "idle": 1 - sum(busy) / (workers * total),
        "x": math.log2(calibrated_recipe(calibration).lr),
        "length": statistics.fmean(
            len(trial.curve or []) / replay.steps for trial in ran
        ),
        "trials": len(ran),
    }


def row_of(
    trials: int,
    workers: int,
    found: list[dict[str, float]],
    one: list[dict[str, float]],
) -> dict[str, Any]:
    """A row of the table: means over calibrations and draws."""
    pairs = list(zip(found, one, strict=True))
    gains = [alone["time"] / many["time"] for many, alone in pairs]
    return {
        "trials": trials,
        "workers": workers,
        "speed-up": statistics.fmean(gains),
        "its standard deviation": statistics.stdev(gains),
        "of ideal, %": 100 * statistics.fmean(gains) / workers,
        "last round, % of the time": 100
        * statistics.fmean(many["last"] for many, _ in pairs),
        "idle, % of the workers' time": 100
        * statistics.fmean(many["idle"] for many, _ in pairs),
        "run length, % of a whole one": 100
        * statistics.fmean(many["length"] for many, _ in pairs),
        "octaves apart, median": statistics.median(
            abs(many["x"] - alone["x"]) for many, alone in pairs
        ),
    }


def rows_of(
    trials: int, replays: list[Replay], times: dict[int, list[float]], draws: int
) -> list[dict[str, Any]]:
    """The table's rows for a number of trials."""
    alike = {rank: [statistics.median(taken)] for rank, taken in times.items()}
    drawn = {
        w: [simulated(r, w, trials, times, s) for r in replays for s in range(draws)]
        for w in WORKERS
    }
    steady = {
        w: [simulated(r, w, trials, alike, 0)["time"] for r in replays] for w in WORKERS
    }
    rows = []
    for workers in WORKERS:
        row = row_of(trials, workers, drawn[workers], drawn[1])
        gain = statistics.fmean(
            one / many for one, many in zip(steady[1], steady[workers], strict=True)
        )
        rows.append({**row, "speed-up, equal steps": gain})
    return rows


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option(
    "--draws",
    default=DRAWS,
    show_default=True,
    help="Draws of the step times. Fewer are not written.",
)
@click.option(
    "--most",
    default=max(TRIALS),
    show_default=True,
    help="Trials at most. Fewer are not written.",
)
def main(draws: int, most: int) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    times, replays, rows = step_times(), [Replay(name) for name in REPLAYED], []
    for trials in (n for n in TRIALS if n <= most):
        rows += rows_of(trials, replays, times, draws)
        click.echo(
            "\n".join(
                "  ".join(map(shown, row.values())) for row in rows[-len(WORKERS) :]
            )
        )
    if draws >= DRAWS and most >= max(TRIALS):
        on = {
            **machine(1),
            "calibrations": len(replays),
            "draws": draws,
            "seeds": f"0 to {draws - 1}",
        }
        record(
            "cluster_simulation",
            "What many workers gain",
            rows,
            on,
            (__doc__ or "").split("\n\n")[2:],
        )


if __name__ == "__main__":
    main()
