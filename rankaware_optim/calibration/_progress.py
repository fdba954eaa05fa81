"""Progress of a calibration: a bar in a notebook or on a terminal, a line a trial elsewhere."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

# takes the trials done, with the share of the running one, what runs, and the best base rate
Show = Callable[[float, str, "float | None"], None]


@contextmanager
def progress_shown(wanted: bool, expected: int, before: int) -> Iterator[Show]:
    """Yield a function that shows how far a calibration is, on standard error: by a bar in a
    notebook or on a terminal, elsewhere by a line for each trial.

    expected: the likely number of trials. before: the number of those that had ended before.
    """
    from rich.console import Console

    console = Console(stderr=True)
    is_live = console.is_jupyter or console.file.isatty()
    bar = tqdm(
        desc="calibrate",
        total=expected,
        initial=before,
        file=console.file if is_live else io.StringIO(),
        miniters=0,
        smoothing=0,
        dynamic_ncols=is_live,
        ascii=not is_live,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {remaining} left",
        disable=not wanted,
    )
    printed = before

    def show(done: float, what: str, best: float | None) -> None:
        nonlocal printed
        bar.n, bar.total = done, max(expected, math.ceil(done))
        words = f"trial {math.ceil(done)}/{bar.total}, {what}"
        words += "" if best is None else f", best rate {best:.3g}"
        bar.set_description_str(words, refresh=False)
        bar.update(0)
        if wanted and not is_live and int(done) > printed:
            printed = int(done)
            print(bar, file=console.file, flush=True)

    with bar:
        yield show
        bar.total = bar.n or expected  # the search may end early
        bar.update(0)
