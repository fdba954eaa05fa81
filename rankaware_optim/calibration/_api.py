"""Calibration: a short Optuna study of the base rate at several ranks, whose result is a recipe."""

from __future__ import annotations

import io
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
import torch
from torch.optim import Optimizer
from tqdm.auto import tqdm

from .._optimizers import get_optimizer_class
from .._warn import warn
from ..laws import PRIOR_LAW, Law, recordable_law
from ..recipe import Recipe
from ._constants import SEEDS, TIMED
from ._provenance import source_of
from ._runner import Runner, Show
from ._schedule import Options, caution
from ._trial import Train


def calibrate(  # noqa: PLR0913
    train: Train,
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int,
    name: str = "calibration",
    law: str | Law = PRIOR_LAW,
    trials: int | None = None,
    budget: int | None = None,
    full_trials: int = 0,
    seeds: Sequence[int] = SEEDS,
    lr_range: tuple[float, float] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    batch: float | None = None,
    warmup: float | None = None,
    seed: int = 0,
    progress: bool = True,
    target_steps: int | None = None,
) -> Recipe:
    """Find the base rate, how it moves with rank, and how certain both are, by short runs. Return
    them as a recipe.

    `train(trial)` is a generator. It builds the model for `trial.rank`, gets
    `trial.optimizer(model, ...)`, and yields a value to minimise at every step of the optimizer:
    one a step, not one a micro-batch. If it ends by itself at `trial.steps` and returns a number,
    this is the run's score. Otherwise it is closed,
    and the score is the mean of the last tenth of its values (at least 5). It may raise
    `optuna.TrialPruned` to stop a run. Draw all random numbers, the data included, from
    `trial.seed`. Runs of one rank and seed can then be compared without noise. A recipe notes if
    they cannot.

    The search starts at the highest rank and above the usual rates. It moves outwards in steps of
    a factor of 4 until the optimum is bracketed. The following runs measure around the optimum, at
    each rank in turn, with four runs per seed. A run is stopped if it diverges, that is, if its
    loss rises above its start by half the best gain and by more than the noise of its batches
    explains. It is also stopped if it clearly lags behind the best run of its rank and seed at the
    same step. Stopped runs enter the fit too.

    **Calibrate short, train long.** `steps=2000, target_steps=8000` trains for 2000 steps and
    returns a recipe for 8000. Every trial is a whole run with its own warm-up and decay over
    `trial.steps`. The rate stays, since it rose with the steps on some tasks and fell on others,
    and the band grows with the distance to the target. A trial should have an eighth of the
    target's steps.

    **Full finetuning.** `full_trials=3` adds three full runs around the predicted rate. This is the
    most reliable way. With LoRA trials only, `recipe.at(method="full")` has a wide band. Where
    B starts at zero, as in PEFT, the rate follows from the law. Where A starts at zero, the line
    through the optima of two ranks is extended to r = n.

    **Resuming.** With `storage=`, the same call continues where it stopped, even if it was killed.
    Finished trials are kept, and an unfinished trial is run again. Several processes and machines
    may make the same call with one storage at the same time. They share the trials and wait for
    each other. Those that begin at the same moment may each add a run. A process that ends by
    Ctrl-C or an error gives its trial back at once. One that is killed or suspended writes no more
    heartbeats. Within a minute its trial is run again by another process, on any host, or by the
    same call. If it wakes up, its run does not count.

    **DDP and FSDP.** Call it on every process. One process decides. All get the same rate, prune at
    the same step and return the same recipe. Values are averaged over the processes.

    Args:
        train: the training loop, a generator function of a `Trial`.
        optimizer: a torch optimizer class or its name.
        ranks: LoRA ranks to try: the lowest and the highest that you want to use. None stands for
            full finetuning. Rates are interpolated between the ranks. Outside them the band grows
            with the distance.
        steps: optimizer steps per trial.
        name: the name of the study and of the recipe.
        law: the law that maps rates between ranks, by default µA. It must be registered. The fall
            in rank at A = 0 is in the fit's prior.
        trials: number of runs at `ranks`. By default as many as `budget` allows, or
            `TRIALS_PER_RANK` at each of them.
        budget: optimizer steps of all trials together, which one process never exceeds. Pruned and
            killed trials count the steps they ran.
        full_trials: number of full-finetuning runs after those at `ranks`, around the predicted
            rate.
        seeds: random seeds, the same for all ranks. `trial.seed` seeds torch, numpy and random for
            each run.
        lr_range: lowest and highest base rate at the highest rank. The first run has the rate in
            their middle, so (lr / 16, 16 * lr) searches around a rate that you have. The range is
            widened if the best rate is at an edge.
        sampler: an Optuna sampler. By default it brackets the optimum and then refines it.
        pruner: an Optuna pruner, by default `PairedPruner`.
        storage: path of a journal file, or an Optuna URL or storage. By default the study is kept
            in memory.
        batch: examples per step of the target run, if known. The rate belongs to it, so the recipe
            records it.
        warmup: share of the steps with a rising rate, from 0 to 1, if known. Nothing is pruned
            before its end.
        seed: random seed of the sampler.
        progress: whether to show on standard error how far it is: a bar with the time left and the
            best rate so far in a notebook or on a terminal, elsewhere a line for each trial.
        target_steps: number of steps of the target run, by default `steps`.

    Returns:
        The recipe for the target run.

    Raises:
        CalibrationError: `train`, an argument or the storage cannot be used, or every run diverged.
        CalibrationInterrupted: Ctrl-C. Finished trials stay in `storage`, and `.recipe` holds their
            fit.
    """
    options = options_of(
        optimizer,
        law,
        ranks=ranks,
        seeds=seeds,
        steps=steps,
        trials=trials,
        budget=budget,
        full_trials=full_trials,
        lr_range=lr_range,
        target_steps=target_steps,
        batch=batch,
        warmup=warmup,
        seed=seed,
        name=name,
    )
    state = random.getstate()  # importing rich and using a database may draw from it
    gradients = torch.is_grad_enabled()  # Ctrl-C inside no_grad() may leave them off
    runner = Runner(options, source_of(train))
    leads = runner.team.leads
    try:
        runner.open(sampler, pruner, storage)
        if leads and (words := caution(options)):
            warn(words)
        shown = progress_shown(progress and leads, options, runner.before)
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
    """Return the checked arguments of `calibrate`.

    Raises:
        CalibrationError, OptimizerError, LawError: one is impossible.
    """
    return Options(get_optimizer_class(optimizer), recordable_law(law), **others)


@contextmanager
def progress_shown(wanted: bool, options: Options, before: int) -> Iterator[Show]:
    """Yield a function that shows how far a calibration is, on standard error: first what it costs,
    in steps and after ten of them in hours, then a bar in a notebook or on a terminal, elsewhere a
    line for each trial.

    before: the number of trials that had ended before.
    """
    from rich.console import Console

    console, expected = Console(stderr=True), options.expected
    is_new = wanted and not before
    if is_new:
        print(f"calibrate: {options.price}", file=console.file, flush=True)
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
