"""Progress of a calibration: trial, rank, rate, value, time left. With rich on a terminal, and by
logging per trial.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from ._trial import Trial
from ._trials import TrialRecord, Trials

_LOG = logging.getLogger(__package__)

Show = Callable[[Trial, "list[float]"], None]


@contextmanager
def progress_shown(wanted: bool | None) -> Iterator[Show]:
    """Yield a function that shows the state of a trial. It does nothing if no progress is wanted.

    wanted: None means "if standard error is a terminal".
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal if wanted is None else wanted):
        yield lambda trial, curve: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("trial {task.fields[trial]} · {task.fields[what]}")
    with Progress(text, BarColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("calibrate", total=None, trial="0", what="starting")

        def show(trial: Trial, curve: list[float]) -> None:
            done, expected, band = trial._progress
            total = max(expected, done + 1)
            lr = trial.lr or math.nan
            what = f"{_rank(trial.rank)} · base rate {lr:.2g} · value {curve[-1]:.4g}"
            if band is not None:
                low, best, high = band
                what += f" · best so far {best:.2g} ({low:.2g} to {high:.2g})"
            completed = done + len(curve) / trial._steps
            bar.update(
                task,
                completed=completed,
                total=total,
                trial=f"{done + 1}/{total}",
                what=what,
            )

        yield show


class TrialLog:
    """Logs finished trials of a study, with the time left at their pace since this object was made.

    expected: the likely number of trials.
    """

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._start = time.monotonic()
        self._before: int | None = None  # trials that had ended before the first look
        self._logged: set[int] = set()

    def look(self, trials: Trials, number: int | None = None) -> None:
        """Log the trials that ended since the last look, or only that with this number. The first
        look logs nothing.
        """
        for trial in trials.counted():
            if trial.number in self._logged:
                continue
            self._logged.add(trial.number)
            if self._before is not None and number in (None, trial.number):
                self._log(trial, len(self._logged), self._before)
        if self._before is None:
            self._before = len(self._logged)

    def _log(self, trial: TrialRecord, done: int, before: int) -> None:
        pace = (time.monotonic() - self._start) / (done - before)
        run = trial.observation
        value = trial.curve[-1] if trial.curve else math.nan
        stopped = trial.stopped.replace("memory", "out of memory")
        if run is not None and run.stopped:
            stopped = "diverged"
        elif run is not None:
            value = run.value
        _LOG.info(
            "trial %d/%d · %s · base rate %.2g · value %.4g%s · %s left",
            done,
            max(self._expected, done),
            _rank(trial.rank),
            math.nan if trial.x is None else 2.0**trial.x,
            value,
            f" ({stopped})" if stopped else "",
            timedelta(seconds=round(pace * max(self._expected - done, 0))),
        )


def _rank(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"
