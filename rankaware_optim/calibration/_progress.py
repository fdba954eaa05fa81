"""Progress of a calibration: a bar in a notebook or on a terminal, lines elsewhere, and a log
record per trial.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from tqdm.auto import tqdm

from ._trials import TrialRecord, Trials

_LOG = logging.getLogger(__package__)
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"

# takes the trials done, with the share of the running one, what runs, and the best base rate
Show = Callable[[float, str, "float | None"], None]


@contextmanager
def progress_shown(wanted: bool, log: TrialLog) -> Iterator[Show]:
    """Yield a function that shows how far a calibration is, on standard error: by a bar in a
    notebook or on a terminal, elsewhere by a line for each tenth of the trials, unless `log` shows
    each of them.
    """
    from rich.console import Console

    console = Console(stderr=True)
    has_bar = console.is_jupyter or console.file.isatty()
    has_lines = wanted and not has_bar and not _LOG.isEnabledFor(logging.INFO)
    expected, before = log.expected, log.before or 0
    start, tenth = time.monotonic(), 10 * before // expected
    bar = tqdm(
        desc="calibrate",
        total=expected,
        initial=before,
        miniters=0,
        smoothing=0,
        dynamic_ncols=True,
        bar_format=_BAR,
        disable=not (wanted and has_bar),
    )

    def show(done: float, what: str, best: float | None) -> None:
        bar.n, bar.total = done, max(expected, math.ceil(done))
        words = f"trial {math.ceil(done)}/{bar.total}, {what}"
        words += "" if best is None else f", best rate {best:.3g}"
        bar.set_description_str(words, refresh=False)
        draw()

    def draw() -> None:
        nonlocal tenth
        bar.update(0)
        before_this, tenth = tenth, int(10 * bar.n / bar.total)
        if has_lines and tenth > before_this:
            passed = time.monotonic() - start
            options = {"prefix": bar.desc, "bar_format": _BAR, "initial": before}
            line = tqdm.format_meter(bar.n, bar.total, passed, ascii=True, **options)
            print(line, file=console.file, flush=True)

    with bar:
        yield show
        bar.total = bar.n or expected  # the search may end early
        draw()


class TrialLog:
    """Logs finished trials of a study, with the time left at their pace since this object was made.

    expected: the likely number of trials.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self._start = time.monotonic()
        self.before: int | None = None  # trials that had ended before the first look
        self._logged: set[int] = set()

    def look(self, trials: Trials, number: int | None = None) -> None:
        """Log the trials that ended since the last look, or only that with this number. The first
        look logs nothing.
        """
        for trial in trials.counted():
            if trial.number in self._logged:
                continue
            self._logged.add(trial.number)
            if self.before is not None and number in (None, trial.number):
                self._log(trial, len(self._logged), self.before)
        if self.before is None:
            self.before = len(self._logged)

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
            max(self.expected, done),
            rank_words(trial.rank),
            math.nan if trial.x is None else 2.0**trial.x,
            value,
            f" ({stopped})" if stopped else "",
            timedelta(seconds=round(pace * max(self.expected - done, 0))),
        )


def rank_words(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"
