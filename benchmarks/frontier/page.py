"""What do I get for what price? What a way to a learning rate costs, and what it loses.

    python benchmarks/frontier/runs.py --domain language         # real runs, resumable
    python benchmarks/frontier/searches.py --domain language     # real searches, resumable
    python benchmarks/frontier/page.py                           # results/frontier.md and its picture

**Rules**, committed before the real runs.

* *Cost* is the number of steps that are trained before the real run, divided by the steps of the real run. If a way
  needs a learning rate tuned at rank 16, this rate is free. An optimizer that finds its own learning rate costs
  nothing. A range test takes 100 steps, as in common tools, and is charged for the one rank that it tests. Every other
  search gives a learning rate for all ranks.
* *Loss* is the share of the possible improvement that is lost. The possible improvement is the loss before training
  minus the lowest mean loss of any learning rate in the sweep. Losses are scored at every rank but the tuned one, and
  in full finetuning, on seeds that the way has not seen. A diverged run loses 500 %.
* *A learning rate* is scored by the study's spline through the runs of the sweep (`study/loss_curves.py`). *An
  optimizer* that finds its own learning rate is run on two seeds of the sweep. *A search* that costs a quarter of a run
  to two runs is run on other seeds than those of the sweep. Searches that cost as much as a calibration or more are
  simulated on the sweeps, as in `simulated.md`.
* *If people disagree* on a setting, the way is run with each setting, and the better mean of a column counts.
* The mean is over tasks, each of which counts with the mean over its cells. The 95th percentile is over cells. There
  are fewer cells with real runs than cells in the sweeps, so a second table shows all ways on the cells with real runs.

**Real runs at the suggested learning rate.** At 400 steps, the suggested learning rate lies below those of the sweeps,
so AdamW was run at it on one seed (`frontier/suggested_runs.py`). The same runs at 800 steps are in `finder.md`.

**Limits of the sweeps.** The nine tasks have sweeps at all ranks with their own number of steps. One of the tasks has
only one seed, and there a real run is scored on the seed that it has seen. Five tasks also have sweeps of 400 steps, at
rank 128 with alpha = rank and in full finetuning. A trial of an eighth then has 50 steps, which a user might well run.
The optimizers were run on these five tasks. At 400 steps, settings that had been worse before or that were added later
(`d_coef` .5, `d0`) have one seed, and so have the runs of 800 steps. Beyond the learning rates of a sweep, losses are
extrapolated as in `calibration/surfaces.py`. The default law and the four trials of the finder were chosen after a look
at most of these tasks.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import click
import numpy as np
from calibration import finder
from calibration.finder_page import run_at_suggested
from calibration.plain import BY_RANK, EVERY_RANK, GRID, TPE, TRIALS
from frontier import searches, simulations
from frontier.adaptive import (
    ADAPTIVE,
    FROM_D0,
    PRODIGY,
    SAFEGUARDED,
    SCHEDULE_FREE,
)
from frontier.figure import Evidence, Point, draw_frontier
from frontier.runs import AT_A, AT_B, KEPT, ROWS, SHORT, STORE, TASKS
from frontier.scores import OURS, OWN, Sweeps, of_length, own_steps
from frontier.simulations import (
    CALIBRATION,
    FULL_TRIALS,
    GRIDS,
    RECIPES,
    Searched,
    recipes_on_file,
    simulated,
    whole_grids,
)
from frontier.ways import (
    A_RATE,
    FREE,
    LAW,
    NOTHING,
    ROOT,
    SUGGESTED,
    TENTH,
    seeds_of,
)
from recording import (
    RESULTS,
    block,
    draw,
    machine,
    number,
    write_explained,
)
from study.configurations import TUNED
from study.domains import HELD_OUT, STUDY, get_domain
from study.grids import FULL, Losses
from study.longer import LONGEST, MARK
from study.runs_on_file import made_by, read_begun

RESTS_ON = ("laws", "transfer", "recipe", "calibration")
CURVES, REAL, SIMULATED = "on the sweeps", "real runs", "simulated"
LONG = 400


class Lost(NamedTuple):
    """What a way loses in a cell, with the setting that it was run with."""

    way: str
    task: str
    config: str
    rank: int
    lost: float
    setting: str = ""


# --- what every way loses -------------------------------------------------------------------------------------------


def free(on: Sweeps) -> Iterator[Lost]:
    """The ways that need no run, in the configurations that were swept."""
    for name, way in FREE.items():
        for config in way.configs:
            if not on.has(config + way.added):
                continue
            for seed, scored in seeds_of(way, on, config):
                rates = way.rates(on, config, seed)
                for rank, x in rates.items():
                    trained = config if rank == FULL else config + way.added
                    lost = on.lost_at(trained, rank, x, scored)
                    if name == SUGGESTED and on.steps == LONG and config == AT_A:
                        run = run_at_suggested(on.task, rank, LONG)
                        lost = lost if run is None else run
                    yield Lost(name, on.task, config, rank, lost)


def of_searches(found: Iterable[Searched]) -> Iterator[Lost]:
    """Searches, on seeds that they have not seen."""
    for each in found:
        on = Sweeps(each.task, OWN)
        unseen = on.unseen(*each.seen)
        for rank in on.targets(each.config):
            lost = on.lost_at(each.config, rank, each.rates[rank], unseen)
            yield Lost(each.way, each.task, each.config, rank, lost)


def of_long_searches() -> Iterator[Lost]:
    """The real searches for a run of 400 steps."""
    for found in long_searches():
        on = Sweeps(found.task, LONG)
        for rank in {128, FULL} & {*found.rates}:
            lost = on.lost_at(AT_A, rank, found.rates[rank], on.unseen())
            yield Lost(found.way, found.task, AT_A, rank, lost)


def long_searches() -> Iterator[searches.Found]:
    """The real searches on file, and those of the finder from rank 16 and of the range test at each rank."""
    yield from searches.on_file()
    for ask, rates, steps, _ in finder.evidence():
        at = {rank: rate[0] for rank, rate in rates.items()}
        if ask.way == finder.RANGE_TEST:
            yield searches.Found(ask.task, LIGHTNING, ask.seed, at, steps / LONG)
        elif (ask.way, ask.tuned, ask.target) == (finder.AROUND, TUNED, LONG):
            way = QUARTERS if ask.parts == 4 else EIGHTHS
            yield searches.Found(ask.task, way, ask.seed, at, steps / LONG)


def adaptive(on: Sweeps, steps: int) -> Iterator[Lost]:
    """The real runs of optimizers that find their own rate."""
    domain = get_domain(on.task)
    rows = {job: row for row in ROWS for job in row.jobs(domain, steps)}
    for job, loss in on_file().get(on.task, {}).items():
        # a run on a seed more than was asked counts too
        row = rows.get(job._replace(seed=0))
        if row is None:
            continue
        config, *_ = job.scheme.split(MARK)
        lost = on.lost_by(config, job.rank, loss, [job.seed])
        named = AT_A if config == "full" else config
        yield Lost(row.way, on.task, named, job.rank, lost, row.words)


@cache
def on_file() -> Mapping[str, Losses]:
    return read_begun(STORE, TASKS)


# --- tables -----------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """Cells that are averaged: configurations, and whether in full finetuning."""

    name: str
    configs: tuple[str, ...]
    full: bool

    def has(self, lost: Lost) -> bool:
        return lost.config in self.configs and (lost.rank == FULL) == self.full


RANKS_A = Column("another rank, alpha = rank", (AT_A,), False)
RANKS_KEPT = Column("another rank, alpha kept", (KEPT,), False)
RANKS_B = Column("another rank, A = 0", (AT_B,), False)
TO_FULL = Column("full finetuning, alpha = rank", (AT_A,), True)
KEPT_TO_FULL = Column("full finetuning, alpha kept", (KEPT,), True)
COLUMNS = (RANKS_A, RANKS_KEPT, RANKS_B, TO_FULL, KEPT_TO_FULL)


class Score(NamedTuple):
    """A way in a column: the mean over tasks, the 95th percentile over cells, in %, and the setting."""

    mean: float
    high: float
    setting: str = ""

    def words(self) -> str:
        said = f"{number(self.mean, 1)} / {number(self.high, 1)}"
        return f"{said} ({self.setting})" if self.setting else said


def score(losts: Iterable[Lost], way: str, column: Column) -> Score | None:
    """The better of a way's settings."""
    by_setting: dict[str, list[Lost]] = defaultdict(list)
    for each in losts:
        if each.way == way and column.has(each):
            by_setting[each.setting].append(each)
    scores = [scored(each, setting) for setting, each in by_setting.items()]
    return min(scores, default=None)


def scored(losts: Sequence[Lost], setting: str) -> Score:
    by_task: dict[str, list[float]] = defaultdict(list)
    for each in losts:
        by_task[each.task].append(100 * each.lost)
    mean = statistics.fmean(map(statistics.fmean, by_task.values()))
    every = [loss for losses in by_task.values() for loss in losses]
    return Score(mean, float(np.quantile(every, 0.95)), setting)


class Row(NamedTuple):
    """A way in a table: its price in runs, what it needs, and how it was scored."""

    way: str
    price: float
    needs: str
    how: str

    @property
    def ours(self) -> bool:
        _, advised_by = SETTINGS[self.way]
        return advised_by == OURS

    @property
    def name(self) -> str:
        return f"**{self.way}**" if self.ours else self.way

    @property
    def runs(self) -> str:
        return number(self.price, 0 if self.price == round(self.price) else 1)


def table(
    title: str, found: Sequence[Lost], rows: Iterable[Row], columns: Sequence[Column]
) -> str:
    heads = ["runs", "way", "needs", "scored", *(column.name for column in columns)]
    cells = []
    for row in rows:
        scores = list(scores_of(found, row, columns))
        if any(each != "–" for each in scores):
            cells.append([row.runs, row.name, row.needs, row.how, *scores])
    return block(title, heads, cells)


def scores_of(
    found: Sequence[Lost], row: Row, columns: Sequence[Column]
) -> Iterator[str]:
    for column in columns:
        got = score(found, row.way, column)
        yield "–" if got is None else got.words()


QUARTERS, EIGHTHS = "the finder at 1/4", "the finder at 1/8"
LIGHTNING = "LR range test at the rank trained"
FINDERS = {
    QUARTERS: ("`ra.calibrate(trainer)`, or a loop in place, rank 16", OURS),
    EIGHTHS: ("the same with `steps=` of an eighth of the run", OURS),
    LIGHTNING: ("Lightning's `Tuner.lr_find`, its defaults", "Lightning; Smith"),
}
# of every way: in words, and who advises it
SETTINGS: Mapping[str, tuple[str, str]] = {
    **{name: (of.settings, of.advised_by) for name, of in FREE.items()},
    **{name: (of.settings, of.advised_by) for name, of in ADAPTIVE.items()},
    **{name: (of.settings, of.advised_by) for name, of in searches.PLANS.items()},
    **FINDERS,
    **simulations.SETTINGS,
}
FREE_ROWS = [Row(name, 0, way.needs, CURVES) for name, way in FREE.items()]
ADAPTIVE_ROWS = [Row(name, 0, NOTHING, REAL) for name in ADAPTIVE]
PRICED = (CALIBRATION, FULL_TRIALS, TPE, GRID, BY_RANK, EVERY_RANK)


def priced_rows(found: Sequence[Searched]) -> Iterator[Row]:
    """The searches at a task's own steps, by their price."""
    yield Row(RECIPES, price(found, RECIPES), NOTHING, REAL)
    for name in PRICED:
        yield Row(name, price(found, name), NOTHING, SIMULATED)
    yield Row(GRIDS, price(found, GRIDS), NOTHING, CURVES)


def price(found: Sequence[Searched], way: str) -> float:
    """The median number of runs: tasks with fewer ranks need fewer."""
    return round(statistics.median(each.runs for each in found if each.way == way))


def long_rows() -> Iterator[Row]:
    """The searches for a run of 400 steps, by their price."""
    runs: dict[str, list[float]] = defaultdict(list)
    for each in long_searches():
        runs[each.way].append(each.runs)
    costs = {name: round(statistics.fmean(each), 1) for name, each in runs.items()}
    for name in sorted(costs, key=costs.__getitem__):
        yield Row(name, costs[name], NOTHING, REAL)


def by_length(runs: Mapping[int, Sequence[Lost]]) -> Iterator[list[str]]:
    """Rows: each optimizer with each setting, in the tasks that were run at every length."""
    for row in ROWS:
        if row.way not in (PRODIGY, FROM_D0, SAFEGUARDED):
            continue
        cells = [f"{row.way}, {row.words}"]
        for column in (RANKS_A, TO_FULL):
            for losts in runs.values():
                mine = [
                    each
                    for each in losts
                    if (each.way, each.setting) == (row.way, row.words)
                    and each.rank != 4
                    and column.has(each)
                ]
                cells.append(scored(mine, "").words() if mine else "–")
        yield cells


def without(losts: Iterable[Lost], task: str) -> list[Lost]:
    return [each for each in losts if each.task != task]


def by_task(own: Sequence[Lost]) -> Iterator[list[str]]:
    """Rows: the ways from rank 16's rate to full finetuning, task by task."""
    for column in (TO_FULL, KEPT_TO_FULL):
        for way in (LAW, TENTH):
            mine = [each for each in own if each.way == way and column.has(each)]
            parts = [mine, without(mine, UNLIKE)]
            parts += [[e for e in mine if e.task == task] for task in NINE]
            means = [number(scored(part, "").mean, 1) for part in parts]
            yield [f"{way}, {column.name.partition(', ')[2]}", *means]


def what_it_says(
    own: Sequence[Lost], short: Sequence[Lost], long: Sequence[Lost]
) -> str:
    """The page's sentences."""
    rest = without(own, UNLIKE)
    default = [each for each in long if each.setting == "d_coef 1"]
    return "\n\n".join(
        [
            "**What it says.** If you have a learning rate that was tuned at rank 16, convert it by the default law. "
            f"This costs nothing and loses {mean_lost(own, LAW)} % at other ranks; a whole grid loses "
            f"{mean_lost(own, GRIDS)} %. The rule {ROOT} loses {mean_lost(own, ROOT)} %. At 400 steps the rule loses "
            f"{mean_lost(long, ROOT)} % and the law {mean_lost(long, LAW)} %. In full finetuning, a tenth of rank 16's "
            f"learning rate loses {mean_lost(own, TENTH, TO_FULL)} % and the law {mean_lost(own, LAW, TO_FULL)} %. "
            "Reinforcement learning alone causes this difference: without it, a tenth loses "
            f"{mean_lost(rest, TENTH, TO_FULL)} % and the law {mean_lost(rest, LAW, TO_FULL)} %. With alpha fixed, a "
            f"tenth loses {mean_lost(own, TENTH, KEPT_TO_FULL)} % and the law {mean_lost(own, LAW, KEPT_TO_FULL)} %.",
            "If you have no learning rate and want to train nothing to find one, `suggest_lr` loses "
            f"{mean_lost(own, SUGGESTED)} %. Two optimizers do better on the five tasks on which they were run. There, "
            f"`suggest_lr` with AdamW loses {mean_lost(short, SUGGESTED)} %, schedule-free AdamW at its suggested "
            f"learning rate {mean_lost(short, SCHEDULE_FREE)} %, and Prodigy with `d_coef` .5 "
            f"{mean_lost(short, PRODIGY)} %. In full finetuning, schedule-free AdamW loses "
            f"{mean_lost(short, SCHEDULE_FREE, TO_FULL)} %, and Prodigy with its default `d_coef` of 1 loses "
            f"{mean_lost(short, PRODIGY, TO_FULL)} %. At 400 steps with LoRA, schedule-free AdamW loses "
            f"{mean_lost(long, SCHEDULE_FREE)} %, Prodigy with `d_coef` .5 {mean_lost(long, PRODIGY)} %, Prodigy with "
            f"its default {mean_lost(default, PRODIGY)} %, and `suggest_lr` {mean_lost(long, SUGGESTED)} %. Most of what "
            "schedule-free AdamW gains comes from its higher learning rate: AdamW at the same learning rate loses nearly "
            "as little on these five tasks ([the same rate](same_rate.md)).",
            "For longer runs, search at rank 16 and convert the result. Four trials of a quarter, which cost one run "
            f"together, lose {mean_lost(long, QUARTERS)} %, and four trials of an eighth lose {mean_lost(long, EIGHTHS)} %. "
            f"A calibration with {TRIALS} trials loses {mean_lost(own, CALIBRATION)} % at a task's own steps. Lightning's "
            f"range test costs a quarter of a run, and the learning rate of its `suggestion()` loses "
            f"{mean_lost(long, LIGHTNING)} %. When the same curves were read by eye, the learning rates lost 10 and 22 %.",
        ]
    )


def mean_lost(losts: Iterable[Lost], way: str, column: Column = RANKS_A) -> str:
    """The mean that a way loses, as the tables have it."""
    got = score(losts, way, column)
    if got is None:
        raise ValueError(f"Nothing is on file of {way}, {column.name}.")
    return number(got.mean, 1)


# --- the page ---------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--workers", default=2, show_default=True)
def main(workers: int) -> None:
    """Write results/frontier.md and its picture."""
    on = machine(1)
    found = [*simulated(workers), *recipes_on_file(), *whole_grids()]
    own = [lost for each in own_steps() for lost in free(each)]
    own += of_searches(found)
    cells = {*SHORT, (AT_A, FULL)}  # of the real runs at a task's own steps
    in_cells = [each for each in own if (each.config, each.rank) in cells]
    short = [each for each in in_cells if each.task in TASKS]
    for each in own_steps():
        short += adaptive(each, get_domain(each.task).steps)
    long = [lost for each in of_length(LONG) for lost in free(each)]
    for each in of_length(LONG):
        long += adaptive(each, LONG)
    long += of_long_searches()
    longest = [lost for each in of_length(LONGEST) for lost in adaptive(each, LONGEST)]
    rows = [*FREE_ROWS, *priced_rows(found)]
    long_ways = [*FREE_ROWS, *ADAPTIVE_ROWS, *long_rows()]
    picture = [
        Evidence("Nine tasks at their own steps", points(own, rows)),
        Evidence("Five tasks at 400 steps", points(long, long_ways)),
    ]
    draw(draw_frontier(picture), PICTURE, dpi=90)
    settings = [[name, *said] for name, said in SETTINGS.items()]
    parts = [
        what_it_says(own, short, long),
        f"![Loss over price]({PICTURE.name})",
        table("Nine tasks at their own steps", own, rows, COLUMNS),
        block(
            "From rank 16's rate to full finetuning, %", TASK_HEADS, list(by_task(own))
        ),
        table("Five tasks at 400 steps", long, long_ways, (RANKS_A, TO_FULL)),
        table(
            "The cells of the real runs at own steps",
            short,
            [*FREE_ROWS, *ADAPTIVE_ROWS],
            (RANKS_A, RANKS_KEPT, TO_FULL),
        ),
        block(
            "Prodigy by the length of a run",
            LENGTH_HEADS,
            list(by_length({100: short, LONG: long, LONGEST: longest})),
        ),
        block("Settings", ["way", "settings", "who advises it"], settings),
    ]
    stores = [STORE / f"{task}.jsonl" for task in on_file()]
    write_explained("frontier", TITLE, __doc__, *parts, made_by(on, *stores))


def points(found: Sequence[Lost], rows: Iterable[Row]) -> dict[str, list[Point]]:
    """The points of the picture, by column."""
    panels: dict[str, list[Point]] = {column.name: [] for column in DRAWN}
    for row in rows:
        for column in DRAWN:
            if got := score(found, row.way, column):
                has_rate = row.needs == A_RATE
                point = Point(row.way, row.price, *got[:2], row.ours, has_rate)
                panels[column.name].append(point)
    return panels


DRAWN = (RANKS_A, TO_FULL)
NINE = (*STUDY, *HELD_OUT)
UNLIKE = (
    "reinforcement"  # the task whose best rate of full finetuning is unlike the others'
)
TASK_HEADS = ("", "mean", f"without {UNLIKE}", *NINE)
PICTURE = RESULTS / "frontier.png"
TITLE = "The frontier: what a rate costs and what it loses"
LENGTH_HEADS = [
    "",
    *(
        f"{column}: {steps}"
        for column in ("another rank", "full")
        for steps in ("own steps", "400", "800")
    ),
]

if __name__ == "__main__":
    main()
