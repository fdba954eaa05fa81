"""Below a width of 2,048, where no published sweep reaches: by how much is a suggested rate raised?

The rule, written before any task of the second half was looked at:

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
from laws.suggested import suggestion_of, width_of
from recording import block, number
from study.domains import HELD_OUT, STUDY
from study.grids import FULL, Cell
from study.optima import optimum, ranks_in
from study.regret import lost

Kind = Literal["Init[A]", "Init[B]", "full finetuning"]
KINDS: tuple[Kind, ...] = ("Init[A]", "Init[B]", "full finetuning")
CHOOSE, JUDGE = STUDY[::2], (*STUDY[1::2], *HELD_OUT)
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
        statistics.fmean(
            found(cell, exponent).regret for cell in cells_of(task, kind)
        )
        for task in tasks
    )


@cache
def chosen() -> float:
    """The exponent that the first half chooses at Init[A]."""
    return min(EXPONENTS, key=lambda exponent: mean_regret(CHOOSE, "Init[A]", exponent))


def table() -> str:
    """The two halves, without an exponent and with the one that the first half chooses."""
    rows = []
    for kind in KINDS:
        for exponent in (0.0, chosen()):
            for name, tasks in (("choose", CHOOSE), ("judge", JUDGE)):
                rows.append([kind, number(exponent), name, *scores(tasks, kind, exponent)])
    heads = ["for", "c", "tasks that", "regret, mean, %", "above the middle", "held"]
    return block("Below a width of 2,048", heads, rows)


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
