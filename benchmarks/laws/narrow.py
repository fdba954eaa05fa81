"""Should a suggested rate be raised below a width of 2,048, where no published sweep of many models reaches?

The rule, written before the second half was looked at:

* A rate is multiplied by (2048 / width)^c below a width of 2,048, on top of the law. c is one number, so that Init[B]
  and full finetuning take that of Init[A], which is PEFT's default. (Each its own was the first plan. The first half
  chose .60, .85 and 1.50, the last at the end of the range and from four cells. One number is simpler, and the lowest
  of them the safest. The second half had not been looked at.)
* Every second of the study's seven tasks, from the first on, **chooses** c at Init[A]: from 0 to 1.5 in steps of .05
  that with the least mean regret. A task counts by the mean over its configurations and ranks. Regrets are the study's
  (`study/regret.py`): the share of the attainable gain that the suggested rate loses, its margin of half an octave
  included.
* The other three and the two tasks that no choice may rest on **judge**. c is adopted for Init[A], for Init[B] and for
  full finetuning where the mean regret there is lower than without it, and if the 90 % band, moved along and no wider,
  holds 90 % of the best rates there.
* From a width of 2,048 on nothing moves, so that no suggestion for a published model does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple

from laws.another_task import INITS, runs
from laws.suggested import COMMON_WIDTHS, suggestion_of, width_of
from recording import block, number
from study.domains import HELD_OUT, STUDY
from study.grids import Cell
from study.optima import optimum, ranks_in
from study.regret import lost

Kind = Literal["Init[A]", "Init[B]", "full finetuning"]
KINDS: tuple[Kind, ...] = ("Init[A]", "Init[B]", "full finetuning")
CHOOSE, JUDGE = STUDY[::2], (*STUDY[1::2], *HELD_OUT)
TASKS = (*CHOOSE, *JUDGE)
EXPONENTS = [step / 20 for step in range(31)]
KNOWN_WIDTH = 2048.0


class Found(NamedTuple):
    """What a suggestion is worth in a cell: its regret, octaves of the best rate above its band's middle, half the band.

    The best rate is None where it lies outside the grid.
    """

    regret: float
    above: float | None
    half: float


def cells_of(task: str, kind: Kind) -> Iterator[Cell]:
    """The cells of a task that were swept."""
    if kind == "full finetuning":
        yield from ((task, "full", rank) for rank in ranks_in(runs(), task, "full"))
        return
    for config in INITS[kind[5]]:
        yield from ((task, config, rank) for rank in ranks_in(runs(), task, config))


@cache
def found(cell: Cell, exponent: float) -> Found:
    """What the suggestion is worth in a cell with an exponent of the width."""
    task, _, rank = cell
    given = suggestion_of(*cell)
    more = exponent * max(0.0, math.log2(KNOWN_WIDTH / width_of(task, rank)))
    middle = math.log2(given.low * given.high) / 2 + more
    best = optimum(runs(), cell).x
    return Found(
        lost(runs(), cell, cell, math.log2(given.lr) + more),
        None if best is None else best - middle,
        math.log2(given.high / given.low) / 2,
    )


def mean_regret(tasks: Iterable[str], kind: Kind, exponent: float) -> float:
    """The mean over tasks of the mean over their cells."""
    return statistics.fmean(
        statistics.fmean(found(cell, exponent).regret for cell in cells_of(task, kind))
        for task in tasks
    )


@cache
def chosen() -> float:
    """The exponent that the first half chooses at Init[A]."""
    return min(EXPONENTS, key=lambda exponent: mean_regret(CHOOSE, "Init[A]", exponent))


def left_out(task: str) -> float:
    """The exponent that all other tasks choose at Init[A]."""
    others = [other for other in TASKS if other != task]
    return min(EXPONENTS, key=lambda exponent: mean_regret(others, "Init[A]", exponent))


def tables() -> str:
    """What suggestions lose by task and by half, as they are and raised, and the outcome."""
    return "\n\n".join([by_task(), by_half(), outcome()])


def by_task() -> str:
    """A row a task: the regret of every kind, as it is and raised."""
    rows = []
    for task in TASKS:
        half = "chooses" if task in CHOOSE else "judges"
        regrets = [
            number(100 * mean_regret([task], kind, exponent), 1)
            for kind in KINDS
            for exponent in (0.0, chosen())
        ]
        rows.append([task, half, f"{COMMON_WIDTHS[task]}", *regrets])
    heads = ["task", "it", "width"]
    for kind in KINDS:
        heads += [kind, f"{kind}, raised"]
    return block("Below a width of 2,048: share of the gain lost, mean, %", heads, rows)


def by_half() -> str:
    """A row for each half and kind, as it is and raised."""
    rows = [
        [kind, name, number(exponent), *scores(tasks, kind, exponent)]
        for kind in KINDS
        for name, tasks in (("choose", CHOOSE), ("judge", JUDGE))
        for exponent in (0.0, chosen())
    ]
    heads = [
        "for",
        "tasks that",
        "c",
        "lost, mean, %",
        "best above the middle, octaves",
        "90 % band holds",
    ]
    return block("The two halves", heads, rows)


def scores(tasks: Sequence[str], kind: Kind, exponent: float) -> list[str]:
    """The mean regret, octaves of best rates above the middle, and how many of them the band holds."""
    each = [found(cell, exponent) for task in tasks for cell in cells_of(task, kind)]
    seen = [one for one in each if one.above is not None]
    held = sum(abs(one.above or 0.0) <= one.half for one in seen)
    above = statistics.fmean(one.above or 0.0 for one in seen)
    return [
        number(100 * mean_regret(tasks, kind, exponent), 1),
        number(above, 1, sign=True),
        f"{100 * held / len(seen):.0f} % of {len(seen)}",
    ]


def outcome() -> str:
    """Whether the judges adopt the exponent, and what leaving one task out says."""
    before, after = (mean_regret(JUDGE, "Init[A]", c) for c in (0.0, chosen()))
    verdict = "adopted" if after < before else "not adopted"
    each = {task: left_out(task) for task in TASKS}
    lost = {task: mean_regret([task], "Init[A]", c) for task, c in each.items()}
    worst = max(lost, key=lost.__getitem__)
    plain = {task: mean_regret([task], "Init[A]", 0.0) for task in TASKS}
    rest = [task for task in TASKS if task != worst]
    raised = mean_regret(rest, "Init[A]", each[worst])
    as_it_is = mean_regret(rest, "Init[A]", 0.0)
    return (
        f"**Outcome: {verdict}.** The first half chooses c = {number(chosen())} at Init[A]. On the second half the raised "
        f"rates lose {share(after)} in the mean, those as they are {share(before)}. After that look each task was left out in "
        f"turn. The c of the other eight is {number(min(each.values()))} to {number(max(each.values()))}. It loses "
        f"{share(statistics.fmean(lost.values()))} in the mean of the nine, and {share(lost[worst])} on {worst}, whose rates "
        f"lie lower than any other's. Without c it is {share(statistics.fmean(plain.values()))}, at most "
        f"{share(max(plain.values()))}. A task's best rate does not follow from its width, and too high a rate loses far "
        f"more than too low a one. So the suggestion stays low. On the other eight tasks alone their c of {number(each[worst])} "
        f"loses {share(raised)} at Init[A], {share(as_it_is)} without it: seen afterwards, with no task left to judge it."
    )


def share(regret: float) -> str:
    return f"{number(100 * regret, 1)} %"
