"""How far a calibration is, by rich: trial, rank, rate, value, time left, and the estimate so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ._runner import NextTrial, Show
from ._trial import Trial


@contextmanager
def progress_shown(steps: int, wanted: bool | None) -> Iterator[Show]:
    """A function that shows where a trial stands; it does nothing where no progress is wanted.

    steps: of a trial. wanted: None for "where standard error is a terminal".
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal if wanted is None else wanted):
        yield lambda begun, trial, curve: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("trial {task.fields[trial]} · {task.fields[what]}")
    with Progress(text, BarColumn(), TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("calibrate", total=None, trial="0", what="starting")

        def show(begun: NextTrial, trial: Trial, curve: list[float]) -> None:
            total, done = max(begun.expected, begun.done + 1), begun.done * steps + len(curve)
            rank = "full" if begun.rank is None else f"rank {begun.rank}"
            what = f"{rank} · base rate {trial.lr or math.nan:.2g} · value {curve[-1]:.4g}"
            if begun.estimate is not None:
                low, best, high = begun.estimate
                what += f" · best so far {best:.2g} ({low:.2g} to {high:.2g})"
            bar.update(shown, completed=done, total=total * steps, trial=f"{begun.done + 1}/{total}", what=what)

        yield show
