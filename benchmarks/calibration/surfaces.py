"""Losses of a stored sweep, interpolated to any rate. Simulated calibrations take their losses from these."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from study.configurations import CONFIGS, start_of
from study.domains import STUDY, get_domain
from study.grids import FULL, Job, Losses
from study.loss_curves import DIVERGED, regret_between
from study.runs_on_file import read
from study.suite import STORES

BEND = 0.02  # gap, a share of the gain, above which gaps beyond a grid are on a logarithmic scale
SLOPE = 0.3  # least slope per octave of the bent gap below a grid
Gap = Callable[[float], float]


@dataclass(frozen=True)
class Surface:
    """A domain in a configuration: gaps to a rank's best mean loss, as shares of the gain, by log2 of the rate.

    Args:
        domain: the domain's name.
        config: the configuration's name.
        start: the loss before training.
        mean: the gap of the mean loss over seeds, by rank; `FULL` is full finetuning.
        by_seed: the gap of each seed's loss, by (rank, seed).
        best: the lowest mean loss, by rank.
        rates: log2 of the rates that every seed has run, by rank.
        fan_in, full_fan_in: the widths that the law uses for LoRA and for full finetuning.
    """

    domain: str
    config: str
    start: float
    mean: Mapping[int, Gap]
    by_seed: Mapping[tuple[int, int], Gap]
    best: Mapping[int, float]
    rates: Mapping[int, list[float]]
    fan_in: float
    full_fan_in: float

    @property
    def ranks(self) -> list[int]:
        return sorted(rank for rank in self.mean if rank != FULL)

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.by_seed})

    def loss(self, rank: int, seed: int, x: float) -> float:
        """Loss of a seed's run at rate 2^x."""
        return self.best[rank] + (self.start - self.best[rank]) * self.by_seed[
            rank, seed
        ](x)


def study_surfaces(domains: Sequence[str] = STUDY) -> Iterator[Surface]:
    """The study's surfaces: seven domains or those named, three configurations, 5 % warm-up."""
    for domain in domains:
        done = read(STORES / f"{domain}.jsonl")
        yield from (surface_of(domain, config, done) for config in CONFIGS)


def surface_of(domain: str, config: str, done: Losses) -> Surface:
    """The surface of a configuration and full finetuning, from the whole octaves that every seed has run."""
    mine = {
        job: loss
        for job, loss in done.items()
        if job.domain == domain
        and job.scheme in (config, "full")
        and job.x == round(job.x)
    }
    seeds = sorted({job.seed for job in mine})
    start, cells = start_of(domain, done), sorted({job[:3] for job in mine})
    mean, by_seed, best, rates = {}, {}, {}, {}
    for cell in cells:
        rows = {
            x: [mine.get(Job(*cell, x, seed), math.nan) for seed in seeds]
            for x in {j.x for j in mine if j[:3] == cell}
        }
        whole = {
            x: losses
            for x, losses in sorted(rows.items())
            if not any(loss != loss for loss in losses)
        }
        means = {
            x: None if None in losses else statistics.fmean(losses)
            for x, losses in whole.items()
        }
        rank = cell[2]
        rates[rank] = list(whole)
        best[rank] = min(loss for loss in means.values() if loss is not None)
        mean[rank] = gap_of(means, best[rank], start)
        by_seed |= {
            (rank, seed): gap_of(
                {x: losses[i] for x, losses in whole.items()}, best[rank], start
            )
            for i, seed in enumerate(seeds)
        }
    width, largest = get_domain(domain).widths
    full_width = width if CONFIGS[config].init == "B" else largest
    return Surface(domain, config, start, mean, by_seed, best, rates, width, full_width)


def gap_of(losses: Mapping[float, float | None], best: float, start: float) -> Gap:
    """The gap by log2 rate: as `regret_between` in the grid, linear on the scale of `BEND` beyond it.

    Args:
        losses: loss by log2 rate; None if the run diverged.
        best: the rank's lowest mean loss.
        start: the loss before training.
    """
    gaps = {
        x: DIVERGED
        if (loss := losses[x]) is None
        else min((loss - best) / (start - best), DIVERGED)
        for x in sorted(losses)
    }
    xs, bent = list(gaps), [math.asinh(gap / BEND) for gap in gaps.values()]
    untrained, highest = math.asinh(1 / BEND), math.asinh(DIVERGED / BEND)

    def at(x: float) -> float:
        if xs[0] <= x <= xs[-1]:
            return regret_between(gaps, x)
        if x < xs[0]:
            y = min(
                bent[0] + max(SLOPE, bent[0] - bent[1]) * (xs[0] - x),
                max(untrained, bent[0]),
            )
        else:
            y = min(bent[-1] + max(1.0, bent[-1] - bent[-2]) * (x - xs[-1]), highest)
        return BEND * math.sinh(y)

    return at
