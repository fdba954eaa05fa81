"""Progress of a calibration: trial, rank, rate, value, time left. With rich on a terminal, and by
logging per trial.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ._runner import Show
from ._trial import Run, Trial
from ._trials import TrialRecord, Trials

_LOG = logging.getLogger(__package__)


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
    """Logs finished trials of all workers, with the time left at their pace since this object was
    made.

    logs: whether this process logs. It is True on one of several processes that train together.
    """

    def __init__(self, logs: bool) -> None:
        self._start = time.monotonic()
        self._logs = logs
        self._before: int | None = (
            None  # trials that had ended before the first that is logged
        )
        self._logged: set[int] = set()

    def ended(self, trial: Trial, run: Run) -> None:
        """Log a trial of this process."""
        done, expected, _ = trial._progress
        if self._before is None:
            self._before = done
        value = run.score
        if run.stopped:
            value = run.curve[-1] if run.curve else math.nan
        self._log(done + 1, expected, trial.rank, trial.lr, value, run.stopped)

    def saw(self, trials: Trials, expected: int) -> None:
        """Log the trials that other processes finished since the last call. The first call logs
        nothing.
        """
        ended = trials.counted()
        is_first = self._before is None
        if is_first:
            self._before = len(ended)
        for trial in ended:
            if trial.number in self._logged:
                continue
            self._logged.add(trial.number)
            if not is_first:
                lr = None if trial.x is None else 2.0**trial.x
                value, stopped = _end_of(trial)
                self._log(len(self._logged), expected, trial.rank, lr, value, stopped)

    def _log(
        self,
        done: int,
        expected: int,
        rank: int | None,
        lr: float | None,
        value: float,
        stopped: str,
    ) -> None:
        if not self._logs:
            return
        pace = (time.monotonic() - self._start) / (done - (self._before or 0))
        _LOG.info(
            "trial %d/%d · %s · base rate %.2g · value %.4g%s · %s left",
            done,
            max(expected, done),
            _rank(rank),
            math.nan if lr is None else lr,
            value,
            f" ({stopped.replace('memory', 'out of memory')})" if stopped else "",
            timedelta(seconds=round(pace * max(expected - done, 0))),
        )


def _end_of(trial: TrialRecord) -> tuple[float, str]:
    """Return a trial's score, or its last value if it was stopped, and how it was stopped."""
    run = trial.observation
    last = trial.curve[-1] if trial.curve else math.nan
    if run is None:
        return last, trial.stopped
    return (last, "diverged") if run.stopped else (run.value, "")


def _rank(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"
