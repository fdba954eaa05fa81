"""Progress of a calibration: a bar in a notebook or on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from ._schedule import Schedule

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"

# takes the trials done, with the share of the running one, what runs, and the best base rate
Show = Callable[[float, str, "float | None"], None]


@contextmanager
def progress_shown(wanted: bool, schedule: Schedule, before: int) -> Iterator[Show]:
    """Yield a function that shows how far a calibration is, on standard error: by a bar in a
    notebook or on a terminal, elsewhere by a line for each tenth of the trials.

    before: the number of trials that had ended before.
    """
    from rich.console import Console

    console = Console(stderr=True)
    has_bar = console.is_jupyter or console.file.isatty()
    has_lines = wanted and not has_bar
    expected = schedule.expected()
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


def rank_words(rank: int | None) -> str:
    return "full" if rank is None else f"rank {rank}"
