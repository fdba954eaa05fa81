"""What `suggest_lr` says for the study's tasks, at price 0, and what that loses: no run of a task enters it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

from recording import RESULTS, block, number
from study.configurations import CONFIGS, reference_at
from study.domains import HELD_OUT, STUDY, get_domain
from study.grids import FULL, Cell, Losses
from study.optima import optimum, ranks_in
from study.regret import lost
from study.runs_on_file import read_begun

from rankaware_optim import Rate, Reference
from rankaware_optim.transfer import suggest_lr

Kind = Literal["Init[A]", "Init[B]", "full finetuning"]
KINDS: tuple[Kind, ...] = ("Init[A]", "Init[B]", "full finetuning")
TASKS = (*STUDY, *HELD_OUT)
INITS = {
    init: [name for name, config in CONFIGS.items() if config.init == init]
    for init in ("A", "B")
}
# The most common fan-in of each task's adapted layers, of two as common the first layer's: what `suggest_lr` reads off
# the network itself.
COMMON_WIDTHS = {
    "image_generation": 128,
    "vision_classification": 192,
    "language": 192,
    "reinforcement": 128,
    "vision_language": 192,
    "text_classification": 384,
    "language_smollm2": 576,
    "audio": 320,
    "time_series": 128,
    "super_resolution": 576,
}


@cache
def runs() -> Losses:
    """The runs of every task."""
    done = {}
    for found in read_begun(RESULTS / "suite", TASKS).values():
        done.update(found)
    return done


def asked(task: str, config: str, rank: int) -> Reference:
    """A task in a configuration at a rank, or in full finetuning at rank `FULL`."""
    if rank == FULL:
        return Reference(method="full", fan_in=get_domain(task).widths[1])
    width = float(COMMON_WIDTHS[task])
    return replace(reference_at(config, rank), fan_in=width)


def suggestion_of(task: str, config: str, rank: int, kind: Any = None) -> Rate:
    """The suggestion for a task's configuration, as for another kind of task than "other" if given."""
    return suggest_lr(asked(task, config, rank), task=kind)


def suggested(task: str, config: str, rank: int) -> float:
    """log2 of the suggested rate."""
    return math.log2(suggestion_of(task, config, rank).lr)


# --- what it loses ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a suggestion is worth in a cell: its regret, octaves of the best rate above its band's middle, half the band.

    The best rate is None where it lies outside the grid.
    """

    regret: float
    above: float | None
    half: float


def found(cell: Cell, kind: Any = None) -> Found:
    """The worth of a suggestion."""
    given = suggestion_of(*cell, kind)
    middle = math.log2(given.low * given.high) / 2
    best = optimum(runs(), cell).x
    return Found(
        lost(runs(), cell, cell, math.log2(given.lr)),
        None if best is None else best - middle,
        math.log2(given.high / given.low) / 2,
    )


def cells_of(task: str, kind: Kind) -> Iterator[Cell]:
    """The cells of a task that were swept."""
    configs = ["full"] if kind == "full finetuning" else INITS[kind[5]]
    for config in configs:
        yield from ((task, config, rank) for rank in ranks_in(runs(), task, config))


def found_in(kind: Kind) -> list[Found]:
    """Every cell of the nine tasks."""
    return [found(cell) for task in TASKS for cell in cells_of(task, kind)]


def losses() -> str:
    """The regret of every task and kind, and its mean over the tasks."""
    regrets: dict[str, list[float]] = {}
    for task, kind in itertools.product(TASKS, KINDS):
        mean = statistics.fmean(found(cell).regret for cell in cells_of(task, kind))
        regrets.setdefault(task, []).append(100 * mean)
    rows = [
        [task, f"{COMMON_WIDTHS[task]}", *(number(each, 1) for each in regrets[task])]
        for task in TASKS
    ]
    means = [statistics.fmean(column) for column in zip(*regrets.values(), strict=True)]
    rows.append(["mean", "", *(number(mean, 1) for mean in means)])
    title = (
        "The study's tasks: share of the gain that the suggested rate loses, mean, %"
    )
    return block(title, ["task", "width", *KINDS], rows)


def reinforcement() -> str:
    """What task="rl" gives on the study's task of reinforcement learning, beside task="other"."""
    rows = []
    for kind, as_kind in itertools.product(KINDS, ("other", "rl")):
        each = [found(cell, as_kind) for cell in cells_of("reinforcement", kind)]
        above = [one.above for one in each if one.above is not None]
        held = [abs(one.above) <= one.half for one in each if one.above is not None]
        rows.append(
            [
                kind,
                as_kind,
                number(100 * statistics.fmean(one.regret for one in each), 1),
                number(statistics.fmean(above), 1, sign=True),
                number(each[0].half, 1),
                f"{sum(held)} of {len(held)}",
            ]
        )
    heads = ["", "task", "lost, mean, %", "best above the middle, octaves"]
    heads += ["half the band", "bands that hold the best rate"]
    words = (
        '`task="rl"` is for language models: on a published GRPO (`large_models.md`) the rates of `other` collapse and '
        "its own learn. This small policy of width 128 learns best at rates 2.5 octaves higher. The middle was set by the "
        "published run and the band by both, so nothing here judges them."
    )
    return f"{block('Reinforcement learning', heads, rows)}\n\n{words}"
