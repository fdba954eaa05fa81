"""This module prints the progress of a learning rate search: one line for each trial,
and the best learning rate at the end.

All progress lines are printed to standard error. In a notebook, the trials appear in a
single table that grows with each trial.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

from .._printing import Table, printable
from ..recipe import Recipe, known_rate
from ._schedule import Options
from ._trials import Run, Trials, rank_words


class Progress:
    """Print the progress and the result of a learning rate search.

    Args:
        is_shown: whether to print anything.

    Attributes:
        value: the name that is printed for a trial's value. With "reward" the sign is
            reversed, because trials minimise minus the reward. By default a returned score
            is called "score", and the mean of the last yielded values is called "loss".
    """

    def __init__(self, is_shown: bool = True, value: str = "") -> None:
        self.value = value
        self._is_shown = is_shown
        self._table: _NotebookTable | None = None
        self._began = 0.0
        self._ended_before = 0

    def mute(self) -> None:
        """Stop printing.

        In training with DDP, only the leading process prints, and every other process
        calls `mute`.
        """
        self._is_shown = False

    def begin(self, options: Options, trials: Trials, price: str) -> None:
        """Print how many trials the search will run and how many training steps they
        need.

        Nothing is printed if the search continues a stored study, because this study
        already has finished trials.

        Args:
            options: the options of the search.
            trials: the trials of earlier calls, if the study was stored.
            price: a description of what the trials cost in addition to their steps.
        """
        self._began = time.monotonic()
        self._ended_before = len(trials.counted())
        if not self._is_shown:
            return
        if _is_notebook():
            self._table = _NotebookTable()
        if self._ended_before:
            return
        self._say(f"calibrate: {options.price}{_start(options)}")
        if len(options.tried) > 1 and options.anchor is not None:
            self._say(
                f"lr is the base learning rate, which applies at rank {options.anchor}. The"
                " scaling law converts it to each trial's rank."
            )
        if price:
            self._say(f"In addition to these steps: {price}.")

    def trial_ended(self, number: int, trials: Trials, options: Options) -> None:
        """Print how a trial ended.

        Args:
            number: the trial's number in the study.
            trials: the trials so far, including this one.
            options: the options of the search.
        """
        if not self._is_shown:
            return
        run = trials[number]
        done = len(trials.counted())
        # workers that start at the same time may run more trials than planned
        total = max(options.runs, done)
        # The time per trial, counted over all workers that share the study. Trials of earlier
        # calls are left out, because they took none of this call's time.
        one = (time.monotonic() - self._began) / (done - self._ended_before)
        row = _Row(
            trial=f"{done}/{total}",
            rank=rank_words(run.rank) if len(options.tried) > 1 else "",
            lr=_lr(run.lr),
            value=self._value_of(run),
            remark=_remark(run, trials, options.steps),
            left=_clock(one * (total - done)),
        )
        if self._table is not None:
            self._table.add_row(row)
        else:
            self._say(row.line(options))

    def result(self, recipe: Recipe, verdict: str = "", full: str = "") -> None:
        """Print the best learning rate and, if the user's own learning rate is known,
        how far it is from the best one.

        Args:
            recipe: the search's recipe.
            verdict: a sentence from `recipe.judge` about the learning rate that the user has
                used so far.
            full: the call that would measure the learning rate of full finetuning. It is
                printed only if the search tried nothing but LoRA.
        """
        if not self._is_shown:
            return
        self._say(_best_line(recipe))
        if verdict:
            self._say(verdict)
        if full and (line := _full_line(recipe, full)):
            self._say(line)

    def _value_of(self, run: Run) -> str:
        """Return the printed loss, score or reward of a trial, such as "loss 2.31", or
        "" if the trial has none.
        """
        seen = run.observation
        if seen is None or run.end:
            return ""
        name = self.value or ("loss" if run.score is None else "score")
        sign = -1.0 if name == "reward" else 1.0
        return f"{name} {sign * seen.value:.4g}"

    def _say(self, line: str) -> None:
        if self._table is not None:
            self._table.add_line(line)
        else:
            print(printable(line), file=sys.stderr, flush=True)


class _Row(NamedTuple):
    """Contains the columns that are printed for one trial.

    If all trials have the same LoRA rank, the column of the rank is an empty string.
    """

    trial: str
    rank: str
    lr: str
    value: str
    remark: str
    left: str

    def line(self, options: Options) -> str:
        """Return the columns as a line of text.

        The columns are aligned with the columns of the other trials.
        """
        longest = max(len(rank_words(rank)) for rank in options.tried)
        columns = [
            f"trial {self.trial.rjust(2 * len(str(options.runs)) + 1)}",
            self.rank.ljust(longest) if self.rank else "",
            f"lr {self.lr}",
            self.value.ljust(11) if self.value else "",
            self.remark.ljust(11),
            f"{self.left} left",
        ]
        # A trial that diverged has only a remark, which is longer and uses both columns.
        return "   ".join(filter(None, columns))


def _start(options: Options) -> str:
    """Describe at which learning rate the search starts, or return "" if the search has
    not chosen a learning rate yet.
    """
    if options.lr_range is not None:
        low, high = sorted(options.lr_range)
        return f", from the middle of {_lr(low)} to {_lr(high)}"
    if options.suggested is not None:
        return f", from the suggested {_lr(options.suggested.lr)}"
    return ""


def _remark(run: Run, trials: Trials, steps: int) -> str:
    """Return a remark on a trial, such as "best so far" or "diverged at step 20 of 80".

    Return "" if there is no remark on the trial.
    """
    taken = len(run.curve)
    if run.end == "diverged":
        return f"diverged at step {taken} of {steps}"
    if run.end:
        return f"stopped at step {taken} of {steps}: {run.why}"
    others = [each.value for each in trials.counted().at(run.rank) if each is not run]
    is_best = bool(others) and run.value < min(others)
    return "best so far" if is_best else ""


def _best_line(recipe: Recipe) -> str:
    """Return a sentence that states the recipe's learning rate, its 90 % interval, and
    the rank and alpha for which they are valid.
    """
    at = recipe.reference
    where = "for full finetuning"
    if at.method == "lora":
        where = f"at rank {at.rank}, alpha {at.alpha:g}"
    best = known_rate(recipe, at.rank)
    interval = "unknown"
    if best is not None and best.low is not None and best.high is not None:
        interval = f"{_lr(best.low)} to {_lr(best.high)}"
    return f"Best learning rate {_lr(recipe.lr)} (90 % interval {interval}) {where}."


def _full_line(recipe: Recipe, call: str) -> str:
    """Return a sentence that states the predicted learning rate of full finetuning, and
    a call of `calibrate` that would measure this learning rate.

    Return "" if the search tried full finetuning, or if the learning rate of full
    finetuning cannot be predicted.
    """
    if recipe.full_seen or recipe.reference.method == "full":
        return ""
    guess = known_rate(recipe, None)
    if guess is None:
        return ""
    return f"Full finetuning: {_lr(guess)}, which is only a guess. To measure it, use {call}."


def _lr(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1e}"


def _clock(seconds: float) -> str:
    """Format a duration in seconds as minutes and seconds. The hours are only included
    if the duration is at least one hour.

    >>> _clock(2), _clock(754), _clock(7325)
    ('0:02', '12:34', '2:02:05')
    """
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text


# --- notebooks ------------------------------------------------------------------------------------


def _is_notebook() -> bool:
    """Return whether this code runs in a notebook, that is, in an IPython shell with a
    kernel.
    """
    # A notebook has imported IPython already. Looking it up in sys.modules avoids importing it
    # anywhere else, where it may not be installed.
    ipython = sys.modules.get("IPython")
    shell: Any = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class _NotebookTable:
    """Shows the trials as a table in the output of a notebook cell.

    The table is redrawn whenever a row or a line of text is added to it.
    """

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._above: list[str] = []
        self._below: list[str] = []
        self._handle: Any = None

    def add_row(self, row: _Row) -> None:
        self._rows.append(row)
        self._draw()

    def add_line(self, line: str) -> None:
        """Add a line of text above the table, or below the table if it already has
        rows.
        """
        lines = self._below if self._rows else self._above
        lines.append(line)
        self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        # The handle replaces the cell's output. Otherwise each trial would add another table.
        if self._handle is None:
            self._handle = display(self, display_id=True)
        else:
            self._handle.update(self)

    def _as_table(self) -> Table:
        has_ranks = any(row.rank for row in self._rows)
        rows = []
        for row in self._rows:
            rank = [row.rank.removeprefix("rank ")] if has_ranks else []
            rows.append([row.trial, *rank, row.lr, row.value, row.remark, row.left])
        headings = ["trial", "learning rate", "value", "", "time left"]
        if has_ranks:
            headings.insert(1, "rank")
        return Table(
            headings if rows else (),
            rows,
            self._below,
            title=". ".join(line.removesuffix(".") for line in self._above),
            left=("", "value"),
        )

    def __repr__(self) -> str:
        return self._as_table().text()

    def _repr_html_(self) -> str:
        return self._as_table().html()
