"""Calibration: a short Optuna study of the base rate at several ranks, whose result is a recipe."""

from __future__ import annotations

import io
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import torch
from torch.optim import Optimizer
from tqdm.auto import tqdm

from .._optimizers import get_optimizer_class
from .._warn import warn
from ..laws import Law, recordable_law
from ..recipe import Recipe
from ._constants import TIMED
from ._provenance import source_of
from ._runner import Runner, Show
from ._schedule import Options, caution
from ._trial import Train


def search(
    train: Train,
    options: Options,
    *,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    progress: bool = True,
    price: str = "",
) -> Recipe:
    """Run the trials of a calibration, and return their recipe. The arguments are those of the
    public `calibrate`.

    price: what the trials cost beside their steps, in words.

    Raises:
        CalibrationError: `train` or the storage cannot be used, or every run diverged.
        CalibrationInterrupted: Ctrl-C.
    """
    state = random.getstate()  # importing rich and using a database may draw from it
    gradients = torch.is_grad_enabled()  # Ctrl-C inside no_grad() may leave them off
    runner = Runner(options, source_of(train))
    leads = runner.team.leads
    try:
        runner.open(sampler, pruner, storage)
        if leads and (words := caution(options)):
            warn(words)
        shown = progress_shown(progress and leads, options, runner.before, price)
        with shown as runner.show:
            while (setting := runner.next()) is not None:
                runner.run(setting, train)
        return runner.recipe()
    except KeyboardInterrupt as interrupt:
        if not leads:
            raise
        raise runner.interrupted() from interrupt
    finally:
        torch.set_grad_enabled(gradients)
        runner.close()
        random.setstate(state)


def options_of(
    optimizer: type[Optimizer] | str, law: str | Law, **others: Any
) -> Options:
    """Return the checked arguments of a calibration.

    Raises:
        CalibrationError, OptimizerError, LawError: one is impossible.
    """
    return Options(get_optimizer_class(optimizer), recordable_law(law), **others)


@contextmanager
def progress_shown(
    wanted: bool, options: Options, before: int, price: str = ""
) -> Iterator[Show]:
    """Yield a function that shows how far a calibration is, on standard error: first what it costs,
    in steps and after ten of them in hours, then a bar in a notebook or on a terminal, elsewhere a
    line for each trial.

    before: the number of trials that had ended before. price: see `search`.
    """
    from rich.console import Console

    console, expected = Console(stderr=True), options.expected
    is_new = wanted and not before
    if is_new:
        print(f"calibrate: {options.price}{price}", file=console.file, flush=True)
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
    began = 0.0  # when a trial's first step had ended, without which a step is too long

    def show(done: float, what: str, best: float | None) -> None:
        nonlocal printed, began, is_new
        step = round(done * options.steps) % options.steps
        if step == 1:
            began = time.monotonic()
        if is_new and step == 1 + TIMED:
            is_new = False
            pace = (time.monotonic() - began) / TIMED
            hours = options.most_steps * pace / 3600
            words = f"at most {hours:.2g} hours in all, at {pace:.2g} s a step"
            bar.write(f"calibrate: {words}", file=console.file)
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
