"""Do full runs spoil the rates at Init[B] below the lowest rank tried? Three ways, on simulated and on real searches.

    python benchmarks/calibration/below_ranks.py    # results/below_ranks.md, ten minutes

At Init[B] the fit's line goes through LoRA's ranks on to full finetuning, so runs of full finetuning turn it, most at
the lowest ranks. Ways to rate a rank below the lowest tried are scored on the same searches, each with three full runs:

* *today*: the fit of all runs;
* *drift without*: today's rate at the lowest rank tried, moved on by the drift of a fit of the LoRA runs alone;
* *LoRA alone*: the fit of the LoRA runs alone;
* *wider*: today's rate, and .2 or .3 octaves of spread for each octave below, where it is .1.

**Simulated**: studies of `simulated.py` on the study's surfaces at Init[B] at two ranks of the sweep, so that one or two
ranks lie below, with a fifth and three tenths of a sweep's steps. **Real**: the recipes on file at Init[B] of nine tasks,
which tried the lowest and the highest rank. Once as they are, at the lowest rank, which is tried, and once without its
runs, so that one LoRA rank is left. *Regret* is in % of the gain, *held* the share of real best rates inside 90 % bands.
Differences are paired and in points; brackets hold 95 %, by resampling the tasks.

**Rule**, set before the runs. *Drift without* or *LoRA alone* is adopted if over simulated searches its mean regret below
the ranks tried is lower than today's and the interval of the difference lies below zero, and over real ones it is no
higher. Else, if fewer than 85 % of today's bands hold below the ranks tried in one of the kinds, the spread there becomes
the least of .2 and .3 with which 85 % hold in all, or .3 if neither does.

**Amended after a first run** (page at d56aec36), which took a tenth and a fifth of a sweep as one kind. No way won there
either, and 97 % of bands held: of a tenth, three full runs leave two runs of LoRA, and bands of octaves. Now each share is
a kind of its own. *Lower* was added then: a tenth of an octave less for each octave below. It is shown, not judged.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import NamedTuple

import click
import numpy as np
from calibration import simulated
from calibration.fit_recipes_again import BY_FIT, observations_of
from calibration.make_recipes import paths_of
from calibration.simulated import RATES, drawn, real_best, settled_of
from calibration.studies import STEPS, searched
from calibration.surfaces import Gap, Surface, gap_of, study_surfaces
from internals import Calibration, Options, Setting
from recording import block, machine, made_on, number, write_explained
from study.configurations import start_of
from study.domains import HELD_OUT, STUDY
from study.grids import curve
from study.optima import seeds_in
from study.runs_on_file import read
from study.suite import STORES
from torch.optim import AdamW

from rankaware_optim import RankAwareWarning, Recipe
from rankaware_optim.fitting import Fit, Observation, fit_observations, prior_of
from rankaware_optim.laws import PRIOR_LAW, get_law
from rankaware_optim.recipe import RANK_SD, Z90, recipe_of

RESTS_ON = ("search.adam", "calibration.adam", "scores")
CONFIG = "Init[B], s = 1"
SHARES = (0.2, 0.3)
DRAWS, FULL_TRIALS, RESAMPLED = 10, 3, 4000
TODAY, DRIFT, ALONE, LOWER = "today", "drift without", "LoRA alone", "lower"
WAYS = (TODAY, DRIFT, ALONE, LOWER)
SPREADS = (0.1, 0.2, 0.3)


class Score(NamedTuple):
    """A rate at a rank: its regret, a share of the gain, and how many octaves its band and the real best rate are off.

    off: octaves from the real best rate, None if that is not known. sd: of the rate. below: octaves below the lowest
    rank tried.
    """

    task: str
    kind: str
    way: str
    rank: int
    below: float
    regret: float
    off: float | None
    sd: float

    def held(self, spread: float = RANK_SD) -> bool | None:
        """Whether the band holds, with another spread for each octave below."""
        if self.off is None:
            return None
        added = self.below**2 * (spread**2 - RANK_SD**2)
        return abs(self.off) <= Z90 * math.sqrt(self.sd**2 + added)


# --- ways -----------------------------------------------------------------------------------------------------------


def recipes_by_way(
    recipe: Recipe, observations: Sequence[Observation]
) -> dict[str, Recipe]:
    """The recipe of all runs, and that of the LoRA runs alone."""
    ranks = sorted({o.rank for o in observations if o.rank is not None})
    prior = prior_of(recipe.reference, ranks, recipe.full_fan_in)
    lora = [o for o in observations if o.rank is not None]
    kept = {f.name for f in fields(recipe)} - BY_FIT
    others = {name: getattr(recipe, name) for name in kept} | {"ranks": tuple(ranks)}

    def made(fit: Fit | None) -> Recipe:
        assert fit is not None
        return recipe_of(fit, recipe.law.law, recipe.reference, **others)

    return {
        TODAY: made(fit_observations(observations, prior)),
        ALONE: made(fit_observations(lora, prior)),
    }


def scores(
    task: str,
    kind: str,
    recipe: Recipe,
    observations: Sequence[Observation],
    gaps: dict[int, Gap],
) -> Iterator[Score]:
    """Every way's rates at the lowest rank tried and below it."""
    made = recipes_by_way(recipe, observations)
    lowest = made[TODAY].ranks[0]
    ranks = [rank for rank in gaps if rank < lowest]
    at = {
        (way, rank): rate_of(each, rank)
        for (way, each), rank in product(made.items(), (*ranks, lowest))
    }
    shift = at[TODAY, lowest][1] - at[ALONE, lowest][1]
    for rank in gaps:
        if rank > lowest:
            continue
        rate, best, sd = at[ALONE, rank]
        at[DRIFT, rank] = rate + shift, best + shift, sd
        rate, best, sd = at[TODAY, rank]
        less = 0.1 * math.log2(lowest / rank)
        at[LOWER, rank] = rate - less, best - less, sd
        real = real_best(task, CONFIG, rank)
        for way in WAYS:
            rate, best, sd = at[way, rank]
            off = None if real is None else best - real
            below = math.log2(lowest / rank)
            regret = max(0.0, gaps[rank](rate))
            yield Score(task, kind, way, rank, below, regret, off, sd)


def rate_of(recipe: Recipe, rank: int) -> tuple[float, float, float]:
    """log2 of the rate and of the middle of its band, and its standard deviation, octaves."""
    rate = recipe.at(rank, alpha=float(rank))
    low, high = math.log2(rate.low), math.log2(rate.high)
    return math.log2(rate.lr), (low + high) / 2, (high - low) / (2 * Z90)


# --- searches -------------------------------------------------------------------------------------------------------


def from_simulated() -> Iterator[Score]:
    """Studies on the study's surfaces at two ranks, of which the lowest is not the sweep's."""
    for index, on in enumerate(study_surfaces()):
        if on.config != CONFIG:
            continue
        pairs = [(on.ranks[1], on.ranks[-1]), (on.ranks[2], on.ranks[-1])]
        if (on.ranks[1], 64) not in pairs:
            pairs.append((on.ranks[1], 64))
        for ranks, share, draw in product(pairs, SHARES, range(DRAWS)):
            recipe, seen = study(on, ranks, share, (index, draw))
            gaps = {rank: on.mean[rank] for rank in on.ranks}
            yield from scores(on.domain, simulated_at(share), recipe, seen, gaps)


def simulated_at(share: float) -> str:
    return f"simulated, {share:.0%}"


def study(
    on: Surface, ranks: tuple[int, int], share: float, seed: tuple[int, int]
) -> tuple[Recipe, list[Observation]]:
    """A study as `simulated.calibrated` makes it, at these ranks, with its runs."""
    seeds, guess = drawn(on, seed)
    budget = round(share * RATES * 6 * STEPS)
    options = Options(
        AdamW,
        get_law(PRIOR_LAW),
        ranks,
        seeds,
        STEPS,
        budget=budget,
        full_trials=FULL_TRIALS,
    )
    settled = settled_of(on, options)
    seen = []

    def run(study: Calibration, setting: Setting, x: float) -> Observation:
        seen.append(simulated.run(on, study, setting, x))
        return seen[-1]

    return searched(options, settled, guess, run), seen


def from_recipes() -> Iterator[Score]:
    """The recipes on file, as they are and without the runs of the lowest rank."""
    for task in (*STUDY, *HELD_OUT):
        gaps = gaps_of(task)
        for path in paths_of(task, CONFIG):
            recipe = Recipe.load(path)
            runs = list(observations_of(recipe))
            lowest = min(recipe.ranks)
            tried = {rank: gap for rank, gap in gaps.items() if rank == lowest}
            yield from scores(task, "real, tried", recipe, runs, tried)
            left = [o for o in runs if o.rank != lowest]
            without = replace(recipe, ranks=recipe.ranks[1:])
            yield from scores(task, "real, one rank left", without, left, gaps)


def gaps_of(task: str) -> dict[int, Gap]:
    """A task's gap to the best loss at Init[B], by rank."""
    done = read(STORES / f"{task}.jsonl")
    seeds, start, gaps = seeds_in(done, task, CONFIG), start_of(task, done), {}
    for rank in sorted({job.rank for job in done if job[:2] == (task, CONFIG)}):
        losses = curve(done, (task, CONFIG, rank), seeds)
        means = {x: None if math.isinf(loss) else loss for x, loss in losses.items()}
        best = min(loss for loss in means.values() if loss is not None)
        gaps[rank] = gap_of(means, best, start)
    return gaps


# --- the page -------------------------------------------------------------------------------------------------------


def by_task(values: Iterable[tuple[str, float]]) -> list[float]:
    """Means by task, in points."""
    found: dict[str, list[float]] = {}
    for task, value in values:
        found.setdefault(task, []).append(100.0 * value)
    return [statistics.fmean(each) for each in found.values()]


def mean_and_interval(values: Sequence[float]) -> str:
    drawn = np.random.default_rng(0).choice(values, (RESAMPLED, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    mean = statistics.fmean(values)
    return f"{number(mean, sign=True)} [{number(low)}, {number(high)}]"


def rows_of(found: Sequence[Score], kind: str, where: str) -> Iterator[list[str]]:
    """Rows of the table: each way's regret and what its bands hold, also with wider ones."""
    mine = [s for s in found if s.kind == kind and (s.below > 0) == (where == "below")]
    if not mine:
        return
    ways = {way: [s for s in mine if s.way == way] for way in WAYS}
    for way, rows in ways.items():
        mean = statistics.fmean(by_task((s.task, s.regret) for s in rows))
        pairs = zip(rows, ways[TODAY], strict=True)
        differ = by_task((a.task, a.regret - b.regret) for a, b in pairs)
        known = [s for s in rows if s.off is not None]
        off = statistics.fmean(by_task((s.task, s.off or 0.0) for s in known)) / 100
        held = [
            statistics.fmean(
                by_task((s.task, float(s.held(spread) or 0)) for s in known)
            )
            for spread in SPREADS
        ]
        yield [
            f"{kind}: {where}",
            way,
            str(len(rows)),
            number(mean, 2),
            mean_and_interval(differ) if way != TODAY else "–",
            number(off, 2, sign=True),
            *(number(share, 0) for share in held),
        ]


@click.command()
def main() -> None:
    """Write results/below_ranks.md."""
    warnings.simplefilter("ignore", RankAwareWarning)
    on = machine(threads=1)
    found = [*from_simulated(), *from_recipes()]
    simulations = [simulated_at(share) for share in SHARES]
    kinds = (*simulations, "real, tried", "real, one rank left")
    rows = [
        row
        for kind, where in product(kinds, ("below", "at the lowest tried"))
        for row in rows_of(found, kind, where)
    ]
    ranks = sorted({s.rank for s in found})
    by_rank = [
        [str(rank), *row]
        for rank, kind in product(ranks, simulations)
        for row in rows_of([s for s in found if s.rank == rank], kind, "below")
    ]
    heads = (
        "searches",
        "way",
        "rates",
        "regret, %",
        "minus today",
        "octaves off",
        *(f"held at {spread:g}, %" for spread in SPREADS),
    )
    write_explained(
        "below_ranks",
        "Init[B] below the lowest rank tried, with full runs",
        __doc__,
        block("All", heads, rows),
        block("By rank", ("rank", *heads), by_rank),
        made_on(on),
    )


if __name__ == "__main__":
    main()
