"""Which estimator of the loss between swept rates is right? Whole octaves predict the half octaves between them.

    python benchmarks/study/estimators.py    # no training: results/estimators.md, .json

Stored sweeps with half octaves: the fresh seeds of against_sweep.py (the mean of three), and seeds 0 and 1 of
one_constant.py, short_long.py and law_check.py, each alone. Of every curve the runs at whole octaves are kept, and
predict every half octave between two of them, and the other way round. The error is of the regret, a share of the gain
from the loss before training to the best run kept. A diverged run counts as 500 %. Of the three that pages used before,
the one with the least bias is used by all, since headlines are means. That was decided after a look at these figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import click
from recording import RESULTS, machine, record
from study.configurations import PRODIGY, START, start_of
from study.grids import Losses, or_inf
from study.loss_curves import DIVERGED, between, regret_between
from study.runs_on_file import read

RESTS_ON = ("laws.adam", "scores")
BEND = 0.02  # regret above which the bent scale is logarithmic
FRESH = (3, 4, 5)  # seeds that against_sweep.py scores by
LOW = 0.05  # a regret below which rates are good
Regrets = Mapping[float, float]


def on_lines(regrets: Regrets, x: float) -> float:
    """Straight lines between neighbours; all of the way to a diverged run counts as diverged."""
    below, above = (
        max(at for at in regrets if at <= x),
        min(at for at in regrets if at >= x),
    )
    share = (x - below) / (above - below) if above > below else 0.0
    there = (
        regrets[below]
        if share == 0.0
        else (1.0 - share) * regrets[below] + share * regrets[above]
    )
    return min(there, DIVERGED)


def bent(regrets: Regrets, x: float) -> float:
    """The spline on a scale that is logarithmic above `BEND`."""
    scaled = {
        at: math.asinh(min(regret, DIVERGED) / BEND) for at, regret in regrets.items()
    }
    return BEND * math.sinh(between(scaled, x))


ESTIMATORS: dict[str, Callable[[Regrets, float], float]] = {
    "straight lines": on_lines,
    "monotone spline (used)": regret_between,
    "monotone spline, bent scale": bent,
}


class LeftOut(NamedTuple):
    """A run that was left out: the regrets of the runs kept, log2 of its rate, and its regret."""

    kept: Regrets
    x: float
    regret: float


def curves() -> Iterator[tuple[dict[float, float], float]]:
    """Curves of loss by log2 of the rate, each with its loss before training."""
    stores = [RESULTS / "law_check.jsonl"]
    stores += [
        path
        for name in ("one_constant", "short_long")
        for path in sorted((RESULTS / name).glob("*.jsonl"))
    ]
    yield from of_store(read(RESULTS / "calibration_runs.jsonl"), (FRESH,))
    for path in stores:
        yield from of_store(read(path), ((0,), (1,)))


def of_store(
    done: Losses, groups: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[dict[float, float], float]]:
    cells = dict.fromkeys(
        job[:3]
        for job in done
        if job.scheme != START and not job.scheme.endswith(PRODIGY)
    )
    for cell in cells:
        start = start_of(cell[0], done)
        for seeds in groups:
            by_rate: dict[float, list[float]] = {}
            for job, loss in done.items():
                if job[:3] == cell and job.seed in seeds:
                    by_rate.setdefault(float(job.x), []).append(or_inf(loss))
            yield (
                {
                    x: statistics.fmean(each)
                    for x, each in by_rate.items()
                    if len(each) == len(seeds)
                },
                start,
            )


def left_out(curve: Mapping[float, float], start: float) -> Iterator[LeftOut]:
    """Runs half an octave from two runs that are kept, by whole octaves and by half ones."""
    for parity in (0.0, 0.5):
        kept = {x: loss for x, loss in curve.items() if x % 1 == parity}
        best = min(kept.values(), default=math.inf)
        if len(kept) < 3 or not best < start:
            continue
        regrets = {x: (loss - best) / (start - best) for x, loss in kept.items()}
        for x, loss in curve.items():
            if x not in kept and {x - 0.5, x + 0.5} <= kept.keys():
                yield LeftOut(regrets, x, min((loss - best) / (start - best), DIVERGED))


@click.command()
def main() -> None:
    """Write results/estimators.json and .md."""
    runs = [run for curve, start in curves() for run in left_out(curve, start)]
    good = [run for run in runs if on_lines(run.kept, run.x) < LOW]
    rows = [
        row
        for what, mine in (("all", runs), ("good rates", good))
        for row in rows_of(what, mine)
    ]
    notes = [
        (__doc__ or "").partition(".json\n")[2].strip(),
        f"Good rates: lines between runs predict below {LOW:.0%}.",
    ]
    record("estimators", "The loss between swept rates", rows, machine(1), notes)


def rows_of(what: str, runs: list[LeftOut]) -> Iterator[dict[str, Any]]:
    for name, estimate in ESTIMATORS.items():
        errors = [100 * (estimate(run.kept, run.x) - run.regret) for run in runs]
        yield {
            "runs": f"{what} ({len(runs)})",
            "estimator": name,
            "bias, points": statistics.fmean(errors),
            "mean absolute error": statistics.fmean(map(abs, errors)),
            "median": statistics.median(map(abs, errors)),
            "rms": math.sqrt(statistics.fmean(error**2 for error in errors)),
        }


if __name__ == "__main__":
    main()
