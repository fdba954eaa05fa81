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

from ._runner import NextTrial, Show
from ._trial import Outcome, Trial
from ._trials import Trials

_LOG = logging.getLogger(__package__)


@contextmanager
def progress_shown(wanted: bool | None) -> Iterator[Show]:
    """Yield a function that shows the state of a trial. It does nothing if no progress is wanted.

    wanted: None means "if standard error is a terminal".
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
            total, done = max(begun.expected, begun.done + 1), begun.done + len(curve) / begun.steps
            what = (
                f"{_rank(begun.rank)} · base rate {trial.lr or math.nan:.2g} · value"
                f" {curve[-1]:.4g}"
            )
            if begun.estimate is not None:
                low, best, high = begun.estimate
                what += f" · best so far {best:.2g} ({low:.2g} to {high:.2g})"
            bar.update(
                shown, completed=done, total=total, trial=f"{begun.done + 1}/{total}", what=what
            )

        yield show


class TrialLog:
    """Logs finished trials of all workers, with the time left at their pace since this object was
    made.

    logs: whether this process logs. It is True on one of several processes that train together.
    """

    def __init__(self, logs: bool) -> None:
        self._start, self._before, self._logs = time.monotonic(), -1, logs
        self._known: set[int] = set()

    def ended(self, begun: NextTrial, trial: Trial, outcome: Outcome) -> None:
        """Log a trial of this process."""
        curve = outcome.curve
        value = (curve[-1] if curve else math.nan) if outcome.stopped else outcome.score
        self._before = begun.done if self._before < 0 else self._before
        self._say(
            begun.done + 1, begun.expected, begun.rank, trial.lr or math.nan, value, outcome.stopped
        )

    def saw(self, trials: Trials, expected: int) -> None:
        """Log the trials that other processes finished since the last call. The first call logs
        nothing.
        """
        first, ended = self._before < 0, trials.counted()
        self._before = len(ended) if first else self._before
        for t in ended:
            if t.number not in self._known:
                self._known.add(t.number)
                seen, lr = t.observation, math.nan if t.x is None else 2.0**t.x
                value = (
                    t.curve[-1]
                    if t.curve and (seen is None or seen.stopped)
                    else seen.value
                    if seen
                    else math.nan
                )
                if not first:
                    stopped = t.stopped or "diverged" * bool(seen and seen.stopped)
                    self._say(len(self._known), expected, t.rank, lr, value, stopped)

    def _say(
        self, done: int, expected: int, rank: int | None, lr: float, value: float, stopped: str
    ) -> None:
        if not self._logs:
            return
        pace = (time.monotonic() - self._start) / (done - self._before)
        _LOG.info(
            "trial %d/%d · %s · base rate %.2g · value %.4g%s · %s left",
            *(done, max(expected, done), _rank(rank), lr, value),
            f" ({stopped.replace('memory', 'out of memory')})" if stopped else "",
            timedelta(seconds=round(pace * max(expected - done, 0))),
        )


def _rank(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"
