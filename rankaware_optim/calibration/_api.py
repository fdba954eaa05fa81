"""Calibration: a short Optuna study of one number, the base rate, at several ranks at once, becomes a recipe."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from .._checks import check_lr
from .._optimizer_classes import get_optimizer_class
from ..errors import CalibrationError, CalibrationInterrupted
from ..laws import Law, get_law
from ..recipe import Recipe
from ._progress import progress_shown
from ._runner import Runner
from ._schedule import Plan, Target
from ._study import Study
from ._trial import Train

if TYPE_CHECKING:
    import optuna

__all__ = ["calibrate"]


def calibrate(
    train: Train,
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int,
    name: str = "calibration",
    law: str | Law = "mua",
    trials: int | None = None,
    budget: int | None = None,
    until: float | None = None,
    full_trials: int = 0,
    target: Target = "lora",
    seeds: Sequence[int] = (0, 1),
    lr_range: tuple[float, float] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    batch: float | None = None,
    warmup: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Recipe:
    """Find the base rate, its drift in rank and its uncertainty by a short study, as a recipe.

    `train(trial)` is a generator: it builds the model for `trial.rank`, takes `trial.optimizer(model, ...)`, and
    yields a value to minimise every step. `steps` values are taken, then it is closed. A run's score is the
    generator's `return` value if it ends by itself at `trial.steps` with one, else the mean of the last tenth of its
    values (at least 5). Whether it ends is learned in the first trial, by resuming it once more. It may raise
    `optuna.TrialPruned` where a run is not worth going on, or does not fit into memory. Draw everything, data too,
    from `trial.seed`: runs of one rank and seed are then compared without noise, and others are said to be unsteady.

    Trials are spent where they tell most: rates stride outwards from the upper end of usual ones until the optimum is
    bracketed, then measure around it, at the ranks in turn, four runs of each at a seed before the next. A run is
    stopped that diverges, or that clearly lags the best one of its rank and seed at the same step: it then says where
    the optimum is not.

    **For full finetuning**, `full_trials=3` ends with three full runs around the rate predicted for it, the surest
    way. From LoRA trials alone, `target="full"` plans for `recipe.at(method="full")`: with Init[B], whose two ranks
    continued to r = n are the best predictor known, trials go to the ranks as the line to r = n weighs them; with
    Init[A] it is the law's point, good to an octave or two.

    **Stopped and resumed.** With `storage=`, the same call goes on where it stopped, killed or not: finished trials
    are kept, the half-done one is run again at its rank, seed and rate. Several processes and machines may make the
    same call with one storage at once; they share the trials, and this host's wait for one another.

    **Under DDP or FSDP** call it on every process. One decides, all see the same rate and prune at the same step,
    values are averaged over the processes, and all return the same recipe.

    Args:
        train: the training loop, as a generator function of a `Trial`.
        optimizer: a torch optimizer class or its name.
        ranks: LoRA ranks to try, two at least a factor 16 apart tell most; None among them tries full finetuning.
        steps: training steps a trial.
        name: the study's and the recipe's name.
        law: the law that maps rates between ranks; by default µA alone, the fall at Init[B] being the prior's.
        trials: how many runs at `ranks`; by default as many as `budget` pays for, or 8 a rank.
        budget: training steps in all, over every trial, pruned and killed ones at what they ran; never exceeded.
        until: octaves; runs at `ranks` end when the 90 % band of the target is narrower.
        full_trials: runs of full finetuning after those at `ranks`, around the rate predicted for it.
        target: "lora", or "full" to plan for full finetuning from LoRA trials.
        seeds: paired across ranks; `trial.seed` seeds torch, numpy and random around each run.
        lr_range: lowest and highest base rate at the first rank; widened when the best sits at an edge.
        sampler, pruner: Optuna's. By default a sampler that brackets, then refines, and `PairedPruner`.
        storage: a file's path for Optuna's journal, an Optuna URL or storage; by default memory.
        batch, warmup: examples a step and share of steps, if told: they are recorded, since the rate belongs to them.
            Nothing is pruned before the warm-up is over.
        seed: of the sampler.
        progress: show a progress bar; by default where standard error is a terminal.

    Raises:
        CalibrationError: `train`, an argument or the storage is unusable, or every run diverged.
        CalibrationInterrupted: Ctrl-C; finished trials stay in `storage`, and `.recipe` holds their fit.
    """
    ranks, seeds = _check_ranks(ranks), _check_seeds(seeds)
    steps, warmup = _check_count("steps", steps), _check_warmup(warmup)
    plan = Plan(
        ranks,
        seeds,
        steps,
        trials=None if trials is None else _check_count("trials", trials),
        budget=_check_budget(budget, steps, full_trials),
        until=_check_until(until),
        full_trials=_check_full(full_trials, ranks),
        target=_check_target(target, ranks),
    )
    study = Study(
        optimizer=get_optimizer_class(optimizer),
        law=get_law(law),
        ranks=ranks,
        seeds=seeds,
        steps=steps,
        lr_range=_check_range(lr_range),
        batch=_check_batch(batch),
        warmup=warmup,
        seed=_check_seed(seed),
        name=_check_name(name),
        few_full=full_trials > 0,
    )
    with _random_kept():
        return _run(Runner(study, plan), train, (sampler, pruner, storage), progress)


def _run(runner: Runner, train: Train, optunas: tuple[Any, Any, Any], progress: bool | None) -> Recipe:
    try:
        runner.open(*optunas)
        with (
            _interruptible(runner),
            progress_shown(runner.study.steps, progress if runner.team.leads else False) as show,
        ):
            while (task := runner.begin()) is not None:
                runner.one(task, train, show)
        return runner.recipe()
    finally:
        runner.close()


@contextmanager
def _random_kept() -> Iterator[None]:
    """Python's random state as it was: importing rich or optuna and talking to a database may draw from it."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _interruptible(runner: Runner) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not runner.team.leads:
            raise
        done, study = len(runner.study.trials()), runner.study
        error = CalibrationInterrupted(
            f"The calibration was interrupted after {done} of {runner.plan.expected()} trials.",
            "Their fit is this error's .recipe; with storage= the same call goes on where it stopped.",
        )
        error.recipe = study.recipe() if study.fit() is not None else None
        raise error from interrupt


# --- arguments ------------------------------------------------------------------------------------------------------


def _check_ranks(ranks: Sequence[int | None]) -> tuple[int | None, ...]:
    values = tuple(ranks) if isinstance(ranks, Sequence) else ()
    whole = all(r is None or (isinstance(r, int) and not isinstance(r, bool) and r > 0) for r in values)
    if not values or not whole or len(set(values)) != len(values):
        raise CalibrationError(
            f"ranks is {ranks!r}.", "Give distinct positive whole numbers, such as (4, 64), and None for full."
        )
    return tuple(sorted(values, key=lambda r: (r is None, r or 0)))


def _check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    values = tuple(seeds) if isinstance(seeds, Sequence) else ()
    whole = all(isinstance(s, int) and not isinstance(s, bool) and abs(s) < 2**63 for s in values)
    if not values or not whole or len(set(values)) != len(values):
        raise CalibrationError(f"seeds is {seeds!r}.", "Give distinct whole numbers, such as (0, 1).")
    return values


def _check_count(what: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CalibrationError(f"{what} is {value!r}.", "Give a whole number of at least 1.")
    return value


def _check_budget(budget: int | None, steps: int, full_trials: int) -> int | None:
    if budget is None:
        return None
    least = steps * (1 + (full_trials if isinstance(full_trials, int) else 0))
    if _check_count("budget", budget) < least:
        raise CalibrationError(
            f"budget={budget} does not pay for {least // steps} runs of {steps} steps.",
            f"Give {least} training steps at least; thirty runs in all are plenty.",
        )
    return budget


def _check_until(until: float | None) -> float | None:
    if until is not None and not (_is_number(until) and 0 < until < math.inf):
        raise CalibrationError(f"until is {until!r}.", "Give octaves, such as 1.0, or leave it out.")
    return until


def _check_full(full_trials: int, ranks: Sequence[int | None]) -> int:
    if full_trials == 0 and not isinstance(full_trials, bool):
        return 0
    if None in ranks:
        raise CalibrationError(
            f"full_trials={full_trials!r} comes after trials of LoRA, and None is among the ranks already.",
            "Leave one of the two out.",
        )
    return _check_count("full_trials", full_trials)


def _check_target(target: Target, ranks: Sequence[int | None]) -> Target:
    if target not in ("lora", "full"):
        raise CalibrationError(f"target is {target!r}.", "Give 'lora' or 'full'.")
    if target == "full" and ranks == (None,):
        raise CalibrationError("target='full' plans LoRA trials, and ranks holds none.", "Give two LoRA ranks.")
    return target


def _check_range(lr_range: tuple[float, float] | None) -> tuple[float, float] | None:
    if lr_range is None:
        return None
    low, high = (check_lr(lr, "lr_range") for lr in lr_range) if _is_pair(lr_range) else (1.0, 1.0)
    if low >= high:
        raise CalibrationError(f"lr_range is {lr_range!r}.", "Give two rates, the lower first.")
    return math.log2(low), math.log2(high)


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _check_batch(batch: float | None) -> float | None:
    if batch is not None and not (_is_number(batch) and 0 < batch < math.inf):
        raise CalibrationError(f"batch is {batch!r}.", "Give a positive number, or leave it out.")
    return batch


def _check_warmup(warmup: float | None) -> float | None:
    if warmup is not None and not (_is_number(warmup) and 0 <= warmup <= 1):
        raise CalibrationError(f"warmup is {warmup!r}.", "Give a share of the steps, 0 to 1, or leave it out.")
    return warmup


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_seed(seed: int) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise CalibrationError(f"seed is {seed!r}.", "Give a whole number from 0 to 2³² - 1.")
    return seed


def _check_name(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise CalibrationError(f"name is {name!r}.", "Give a name, such as 'digits'.")
    return name
