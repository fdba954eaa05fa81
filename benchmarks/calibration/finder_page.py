"""The page of the finder's searches, and of what stored sweeps say beside them:
`python benchmarks/calibration/finder_page.py`.

**What to conclude.** If you have no learning rate and the run has 400 steps or more, let
`ra.calibrate(trainer)` run four trials with a quarter of the run's steps. Together the four trials cost about
one run. In the configuration in which they were tuned, such searches lose 0.4 % of the possible improvement
on average and 1.7 % at the 95th percentile. Trials of an eighth cost half a run. Such trials lose 0.8 % on
average and 3.7 % at the 95th percentile, and 1.2 and 5.2 % in LoRA runs of 800 steps. On networks outside
this project, trials of an eighth lost more than ten times as much, so use them only if you accept this risk.
One search can serve several runs: if the result of a search at rank 16 is converted by its recipe, 0.1 to 0.7
% is lost at rank 128 and 0.8 to 1.1 % in full finetuning. A search with an existing trainer finds a learning
rate within 0.6 octaves of the same search in the study's training loop, and loses as much.

**Without a search.** At the suggested learning rate, AdamW loses more on these small networks, which need
higher learning rates than large language models (see the last rows of the table of losses). The losses in
these rows come from real runs at the suggested learning rate with seed 0 (`results/suggested/`). The losses
are measured from the best learning rate of the sweep on the same seed. Earlier versions of this page
extrapolated these losses from the lowest learning rate of the sweep, which is one to four octaves higher. A
search over the default range begins two octaves higher than a search around the suggestion, and loses less on
these networks.

**Lightning's range test.** Its `suggestion()` returns learning rates from 8e-8 to 3e-6, which are the same at
every rank. At these learning rates, the noise of the first batches is steepest, and 88 to 100 % of the
improvement is lost. When the same curves were read by eye, as the authors of the test advise, the learning
rates lost 10 and 22 % (read once, by a person outside this project).

**If the number of steps is not fixed**, the learning rate decides whether a search or a longer run is
cheaper. A cell is one combination of task, configuration, rank and number of steps. If the learning rate is
within an octave of the best one, a longer run beats even an exact search that costs half a run in 43 of 48
cells or more. In all cells, it beats an exact search that costs a whole run. Two octaves below the best
learning rate, a longer run beats these two searches in 20 and 35 of the 48 cells. On most published language
models, `suggest_lr` is within an octave of the best learning rate, so a longer run is cheaper. On these small
networks, the suggested learning rate is 1 to 6 octaves too low. There, a search that costs half a run is
cheaper than a longer run in 108 of 120 cells, and a search that costs a run is cheaper in 63. **The results
in these 120 cells are extrapolated**: the loss at the suggested learning rate is extrapolated from the lowest
learning rates of the sweeps. Only the runs of 400 and 800 steps in the table of losses are real. We had
expected that a longer run at the suggested learning rate beats a search that costs half a run in most cells.
This page refutes this expectation. We added the table by octaves after we had seen the table before it.

**When not to trust a search.** If the best learning rate depends on the number of steps, the best learning
rate of a trial is not the best one of the run. In full finetuning of audio, the best learning rate rises
by 1.1 octaves from 50 to 400 steps, and trials of an eighth lose 3 %. With LoRA, the best learning rate falls
on the two language tasks, and the exact optimum of trials of an eighth loses 6 and 10 % at worst. All 90 %
intervals of these searches contain the best learning rate, which is more than 90 % intervals should contain.
The intervals are wide: they extend by a factor of 3 to 16 to either side, and most in full finetuning around
the suggestion. Today, a calibration limits the interval of a search with four trials of a quarter to a factor
of 3.4 (`search.md`).

**An extrapolation to longer runs does not help.** We added a share of the change of the best learning rate
from half of a trial's steps to all of them. The largest share that we tried is the whole change. With exact
optima, adding the whole change lowers what is lost from 0.20 to 0.13 % (trials of a quarter) and from 0.72
to 0.42 % (trials of an eighth) on the tasks that judge. With the optima of real searches, it loses more than
no extrapolation, because their noise is as large as the change. For this reason, all trials of a calibration
have the same number of steps. In runs of 1,600 and 3,200 steps (`../answers.md`), with exact optima of trials
of an eighth, adding half of the change loses as much as adding nothing, 0.2 %.

**The learning rates of these searches come from the fit**, with a margin of at most 0.25 octaves. Today, a
search of four trials uses a parabola without a margin, which loses less (`search.md`).

**The tasks are not new.** We chose on the sweeps of these tasks that a search has four trials and begins at
the guess, and also some constants of the fit. Only the seeds are new here, and no other task tests these
choices.

**The networks of the searches** were pretrained on another processor than the networks of the sweeps, and
their first losses differ by up to 2 %. The runs at the suggested learning rate start from the networks of the
sweeps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from calibration import finder
from calibration.finder import AROUND, PLANS, RANGE_TEST, TASKS, TRAINER, WIDE, Ask
from calibration.surfaces import Surface, surface_of
from frontier import suggested_runs
from frontier.scores import Sweeps
from laws.suggested import suggested
from recording import block, machine, made_on, number, write_explained
from study import longer
from study.configurations import TUNED
from study.grids import FULL, curve, lowest
from study.longer import ARMS, AT_A, LENGTHS
from study.optima import optimum, seeds_in

RESTS_ON = ("transfer",)
PLACES = {
    "rank 16": (TUNED, TUNED),
    "rank 128, moved": (TUNED, 128),
    "full, moved from 16": (TUNED, FULL),
    "full, tuned there": (FULL, FULL),
}
SUGGESTED = "`suggest_lr`, no search"
LONG = (200, 400, 800)
TO_CHOOSE = ("audio", "language", "time_series")
TO_JUDGE = ("image_generation", "super_resolution", "vision_language")
SHARES = (0.0, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1.0)
OFF = (0.0, -0.5, -1.0, -1.5, -2.0, -3.0)  # octaves of an untuned rate from the best
MOVES = 0.5  # octaves from which a best rate moves with the length


# --- the stored sweeps ----------------------------------------------------------------------------------------------


@cache
def surface(task: str, config: str, steps: int) -> Surface:
    named = AT_A if config == "full" else config
    runs = longer.runs_of_length(longer.on_file()[task], steps)
    return surface_of(task, named, runs)


@cache
def best(task: str, config: str, rank: int, steps: int) -> float:
    """log2 of the best rate of a stored sweep; where it is at an edge, the edge."""
    done, cell = longer.on_file()[task], longer.cell_of(task, config, rank, steps)
    vertex = optimum(done, cell).x
    means = curve(done, cell, seeds_in(done, *cell[:2]))
    return lowest(means) if vertex is None else vertex


def arm(rank: int) -> tuple[str, int]:
    return ("full" if rank == FULL else AT_A), rank


@cache
def regret(task: str, rank: int, steps: int, x: float) -> float:
    """The share of the gain that rate 2^x loses in a run of so many steps."""
    on = Sweeps(task, steps)
    return on.lost_at(AT_A, rank, x, range(on.seeds(AT_A, rank)))


# --- what searches lose ---------------------------------------------------------------------------------------------


class Lost(NamedTuple):
    """What the rate of a search loses at a rank.

    Args:
        ask: the search; of a range test at the length for which it is scored.
        rank: where it is scored.
        rate: log2 of its rate, and of its band's ends if it has one.
        trained: the steps of its trials.
        measured: what a real run at the rate has lost, None where the sweep's spline says it.
    """

    ask: Ask
    rank: int
    rate: list[float]
    trained: int
    measured: float | None = None

    @property
    def regret(self) -> float:
        if self.measured is not None:
            return self.measured
        return regret(self.ask.task, self.rank, self.ask.target, self.rate[0])

    @property
    def holds(self) -> bool:
        """Whether the band holds the best rate of the sweep."""
        _, low, high = self.rate
        return low <= best(self.ask.task, *arm(self.rank), self.ask.target) <= high

    @property
    def moves(self) -> float:
        """Octaves by which the best rate where it tuned moves from a trial's steps to the run's."""
        of = self.ask.task, *arm(self.ask.tuned)
        return best(*of, self.ask.target) - best(*of, self.ask.steps)


def losses() -> list[Lost]:
    """What searches lose, of the seeds that were run on all tasks, and what suggested rates lose."""
    lost = []
    for ask, rates, trained, _ in finder.evidence():
        targets = (400, 800) if ask.way == RANGE_TEST else (ask.target,)
        for (rank, rate), target in product(rates.items(), targets):
            lost.append(Lost(ask._replace(target=target), rank, rate, trained))
    for task, (tuned, rank), steps in product(TASKS, PLACES.values(), (400, 800)):
        rate = [suggested(task, *arm(rank))]
        ask = Ask(task, tuned, SUGGESTED, steps, 1, 0)
        lost.append(Lost(ask, rank, rate, 0, run_at_suggested(task, rank, steps)))
    return lost


def run_at_suggested(task: str, rank: int, steps: int) -> float | None:
    """The share of the gain that a real run at the suggested rate has lost, None if there is none."""
    done = suggested_runs.on_file().get(task, {})
    job = suggested_runs.job_of(task, *arm(rank), steps)
    if job not in done:
        return None
    return Sweeps(task, steps).lost_by(AT_A, rank, done[job], [0])


Words = Callable[[Sequence[Lost]], str]


def percent(lost: Sequence[Lost]) -> str:
    return mean_and_high([each.regret for each in lost])


def mean_and_high(regrets: Sequence[float]) -> str:
    """Mean / 95th percentile, in %."""
    if not regrets:
        return "–"
    high = 100 * float(np.quantile(regrets, 0.95))
    return f"{number(100 * statistics.fmean(regrets))} / {number(high, 1)}"


def bands(lost: Sequence[Lost]) -> str:
    """How many bands hold the best rate, and half of the median band, as a factor."""
    with_band = [each for each in lost if len(each.rate) == 3]
    if not with_band:
        return "–"
    half = statistics.median((e.rate[2] - e.rate[1]) / 2 for e in with_band)
    held = sum(each.holds for each in with_band)
    return f"{held} of {len(with_band)} (× {number(2.0**half, 1)})"


def by_place(lost: Sequence[Lost], words: Words) -> Iterator[str]:
    for tuned, rank in PLACES.values():
        yield words([e for e in lost if (e.ask.tuned, e.rank) == (tuned, rank)])


def of_ways(lost: Sequence[Lost], words: Words) -> Iterator[list[str]]:
    """Rows: every way at every length, with its price in runs."""
    ways = [(way, *plan) for way in (AROUND, WIDE) for plan in sorted(PLANS)]
    ways += [(way, n, 0) for way in (SUGGESTED, RANGE_TEST) for n in (400, 800)]
    for way, target, parts in ways:
        asked = way, target, parts or 1
        mine = [e for e in lost if e.ask[2:5] == asked]
        if mine:
            price = statistics.fmean(each.trained for each in mine) / target
            name = f"1/{parts} of {target}" if parts else f"{target} steps"
            yield [f"{name}, {way}", number(price), *by_place(mine, words)]


def of_tasks(lost: Sequence[Lost]) -> Iterator[list[str]]:
    ways = ((AROUND, 4), (AROUND, 8), (SUGGESTED, 1))
    for task, (way, parts) in product(TASKS, ways):
        asked = task, way, parts
        mine = [e for e in lost if (e.ask.task, e.ask.way, e.ask.parts) == asked]
        name = way if parts == 1 else f"1/{parts}, {way}"
        yield [task, name, *by_place(mine, percent)]


def of_runs() -> Iterator[list[str]]:
    """Rows: what runs at the suggested rate have lost, and what the sweep's spline says beyond its lowest rate."""
    for task, steps in product(TASKS, (400, 800)):
        words = []
        for rank in (TUNED, 128, FULL):
            measured = run_at_suggested(task, rank, steps)
            by_spline = regret(task, rank, steps, suggested(task, *arm(rank)))
            run = "not run" if measured is None else number(100 * measured, 1)
            words.append(f"{run} ({number(100 * by_spline, 1)})")
        yield [task, str(steps), *words]


def of_trainers(lost: Sequence[Lost]) -> Iterator[list[str]]:
    """Rows: a built trainer beside the loop's search of the same seed."""
    in_loops = {(each.ask, each.rank): each for each in lost}
    for each in lost:
        ask, rank = each.ask, each.rank
        if ask.way == TRAINER:
            loop = in_loops[ask._replace(way=AROUND), rank]
            apart = number(each.rate[0] - loop.rate[0], sign=True)
            worth = [number(100 * one.regret) for one in (each, loop)]
            yield [
                ask.task,
                str(ask.seed),
                "full" if not rank else str(rank),
                apart,
                *worth,
            ]


# --- where best rates move with the length --------------------------------------------------------------------------

KINDS: dict[str, Callable[[float], bool]] = {
    "rises": lambda octaves: octaves > MOVES,
    "stays": lambda octaves: abs(octaves) <= MOVES,
    "falls": lambda octaves: octaves < -MOVES,
}


def of_moves(lost: Sequence[Lost]) -> Iterator[list[str]]:
    """Rows: what the exact optimum of a trial's steps loses in sweeps, and what searches lose where they tuned."""
    real = [e for e in lost if e.rank == e.ask.tuned and e.ask.way in (AROUND, WIDE)]
    for parts, (kind, test) in product((4, 8), KINDS.items()):
        exact: dict[str, list[float]] = {}
        for task, (config, rank), steps in product(longer.TASKS, ARMS, LONG):
            x = best(task, config, rank, steps // parts)
            if test(best(task, config, rank, steps) - x):
                at_x = surface(task, config, steps).mean[rank](x)
                exact.setdefault(f"{task}, {config}", []).append(at_x)
        regrets = [each for cell in exact.values() for each in cell]
        worst = sorted(exact, key=lambda name: -max(exact[name]))[:3]
        named = "; ".join(f"{at} {number(100 * max(exact[at]), 1)}" for at in worst)
        mine = [e for e in real if e.ask.parts == parts and test(e.moves)]
        counted = [str(len(regrets)), mean_and_high(regrets), named]
        yield [f"1/{parts}", kind, *counted, percent(mine), bands(mine)]


# --- longer or tuned ------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """What a longer run at an untuned rate gains over a tuned one of N steps, as a share of the gain.

    price: of the search, in runs of N steps, by which the other run is longer.
    """

    rank: int
    steps: int
    price: float
    gains: float


def comparisons(off: float | None = None) -> Iterator[Compared]:
    """Every cell, at the suggested rate or so many octaves from the best one of the longer run."""
    for task, (config, rank), steps in product(longer.TASKS, ARMS, LENGTHS[:-1]):
        short, long = (surface(task, config, n) for n in (steps, 2 * steps))
        x = suggested(task, config, rank)
        if off is not None:
            x = best(task, config, rank, 2 * steps) + off
        seeds = long.seeds  # the longest runs have one
        tuned = min(mean_loss(short, rank, seeds, at) for at in short.rates[rank])
        once, twice = (mean_loss(on, rank, seeds, x) for on in (short, long))
        gain = long.start - long.best[rank]
        for price in (0.5, 1.0):
            loss = once + math.log2(1 + price) * (twice - once)
            yield Compared(rank, steps, price, (tuned - loss) / gain)


def mean_loss(on: Surface, rank: int, seeds: Iterable[int], x: float) -> float:
    return statistics.fmean(on.loss(rank, seed, x) for seed in seeds)


def of_suggested() -> Iterator[list[str]]:
    found = [*comparisons()]
    for price, full in product((0.5, 1.0), (False, True)):
        mine = [c for c in found if (c.price, c.rank == FULL) == (price, full)]
        cells = [in_cells(mine, some) for some in (LENGTHS[:3], LENGTHS[3:])]
        yield [number(price, 1), "full" if full else "LoRA", *cells]


def of_untuned() -> Iterator[list[str]]:
    for off in OFF:
        found = [*comparisons(off)]
        prices = [[c for c in found if c.price == price] for price in (0.5, 1.0)]
        yield [number(off, 1), *(in_cells(mine, LENGTHS[3:]) for mine in prices)]


def in_cells(found: Iterable[Compared], steps: Sequence[int]) -> str:
    """In how many cells longer is better, and its mean and median gain in %."""
    gains = [100 * each.gains for each in found if each.steps in steps]
    better = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    middles = statistics.fmean(gains), statistics.median(gains)
    return f"{better} ({'; '.join(number(each, 1, sign=True) for each in middles)})"


# --- a step further -------------------------------------------------------------------------------------------------


def steps_further(tasks: Sequence[str], parts: int, share: float) -> list[float]:
    """Regrets where a share of the change from half a trial's steps to these is added to the exact optimum."""
    found = []
    for task, (config, rank), steps in product(tasks, ARMS, LENGTHS):
        if steps // parts // 2 in LENGTHS:
            near = best(task, config, rank, steps // parts)
            x = near + share * (near - best(task, config, rank, steps // parts // 2))
            found.append(surface(task, config, steps).mean[rank](x))
    return found


def in_real_searches(lost: Sequence[Lost], share: float) -> list[float]:
    """The same with a search of a quarter and one of an eighth for one run to come."""
    tuned = {each.ask: each.rate[0] for each in lost if each.rank == each.ask.tuned}
    found = []
    for ask, near in tuned.items():
        half = tuned.get(ask._replace(parts=8))
        if half is not None and ask.parts == 4 and ask.way in (AROUND, WIDE):
            x = near + share * (near - half)
            found.append(regret(ask.task, ask.tuned, ask.target, x))
    return found


def of_shares(lost: Sequence[Lost]) -> Iterator[list[str]]:
    for share in SHARES:
        cells = [*product((TO_CHOOSE, TO_JUDGE), (4, 8))]
        regrets = [steps_further(tasks, parts, share) for tasks, parts in cells]
        regrets.append(in_real_searches(lost, share))
        yield [number(share), *map(mean_and_high, regrets)]


# --- the page -------------------------------------------------------------------------------------------------------


def goals(lost: Sequence[Lost]) -> Iterator[list[str]]:
    """Rows: each goal, and what was reached."""
    tuned = [e for e in lost if e.rank == e.ask.tuned]
    of_way = {
        way: [e for e in tuned if e.ask.way == way]
        for way in (AROUND, TRAINER, RANGE_TEST)
    }
    for parts, goal in ((4, "0.5 / 2 %"), (8, "2 / 6 %")):
        mine = [e for e in of_way[AROUND] if e.ask.parts == parts]
        yield [f"1/{parts} around the suggestion, where tuned", goal, percent(mine)]
    searched = [e for e in lost if e.ask.way in (AROUND, WIDE)]
    yield ["bands that hold the best rate", "90 %", bands(searched)]
    asked = {each.ask._replace(way=AROUND) for each in of_way[TRAINER]}
    loops = [e for e in of_way[AROUND] if e.ask in asked]
    yield ["a built trainer", f"{percent(loops)} ± 0.5", percent(of_way[TRAINER])]
    of_tests = percent(of_way[RANGE_TEST])
    yield ["the search", f"less than {of_tests}", percent(of_way[AROUND])]


def tables(lost: Sequence[Lost]) -> Iterator[str]:
    heads: list[str]
    yield block("Goals", ["", "goal", "reached"], [*goals(lost)])
    heads = ["search", "price, runs", *PLACES]
    title = "Lost, %: mean / 95th percentile"
    yield block(title, heads, [*of_ways(lost, percent)])
    title = "The suggested rate without a search: real runs and, in brackets, the extrapolation before, % lost"
    heads = ["task", "steps", "rank 16", "rank 128", "full"]
    yield block(title, heads, [*of_runs()])
    title = "The same by task, both lengths"
    heads = ["search", "price, runs", *PLACES]
    yield block(title, ["task", "search", *PLACES], [*of_tasks(lost)])
    title = "Bands that hold the best rate (half of a median band, as a factor)"
    searched = [each for each in lost if len(each.rate) == 3]
    yield block(title, heads, [*of_ways(searched, bands)])
    title = "Where the best rate moves from a trial's steps to the run's, lost in %"
    heads = ["trials", "best rate", "cells of the sweeps", "their exact optima"]
    heads += ["most in", "searches, where tuned", "their bands"]
    yield block(title, heads, [*of_moves(lost)])
    title = "A built trainer beside the loop, 1/4 of 400 steps"
    heads = ["task", "seed", "rank", "octaves apart", "lost by it, %", "by the loop"]
    yield block(title, heads, [*of_trainers(lost)])
    title = "Cells in which a longer run at the suggested rate beats a tuned one (its mean and median gain, %)"
    heads = ["price of tuning, runs", "", "N of 25 to 100", "200 and 400"]
    yield block(title, heads, [*of_suggested()])
    title = "The same at a rate so many octaves from the best, N of 200 and 400"
    yield block(title, ["octaves", "half a run", "a run"], [*of_untuned()])
    title = "A share of the change from half the length added, lost in %"
    heads = ["share", "to choose: 1/4", "1/8", "to judge: 1/4", "1/8", "real searches"]
    yield block(title, heads, [*of_shares(lost)])


def main() -> None:
    """Write results/finder.md."""
    seeds = ", ".join(f"{way} {count}" for way, count in finder.seeds_run().items())
    parts = [f"**Seeds that were run**: {seeds}.", *tables(losses())]
    title = "What the learning-rate finder is worth"
    explained = f"{__doc__}\n{finder.__doc__}"
    write_explained("finder", title, explained, *parts, made_on(machine(1)))


if __name__ == "__main__":
    main()
