"""How far a calibration is, by rich: trial, rank, rate, value, time left, and the estimate so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._runner import Show, Task
    from ._trial import Trial

__all__ = ["progress_shown"]


@contextmanager
def progress_shown(steps: int, wanted: bool | None) -> Iterator[Show]:
    """A function that shows where a trial stands; it does nothing where no progress is wanted.

    steps: of a trial. wanted: None for "where standard error is a terminal".
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal if wanted is None else wanted):
        yield lambda task, trial, curve: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("trial {task.fields[trial]} · {task.fields[what]}")
    with Progress(text, BarColumn(), TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("calibrate", total=None, trial="0", what="starting")

        def show(task: Task, trial: Trial, curve: list[float]) -> None:
            total = max(task.expected, task.done + 1)
            done = task.done * steps + len(curve)
            what = f"{_what(task, trial)} · value {curve[-1]:.4g}{_estimate(task)}"
            bar.update(shown, completed=done, total=total * steps, trial=f"{task.done + 1}/{total}", what=what)

        yield show


def _what(task: Task, trial: Trial) -> str:
    rank = "full" if task.rank is None else f"rank {task.rank}"
    return f"{rank} · base rate {trial.lr or math.nan:.2g}"


def _estimate(task: Task) -> str:
    if task.estimate is None:
        return ""
    low, best, high = task.estimate
    return f" · best so far {best:.2g} ({low:.2g} to {high:.2g})"
