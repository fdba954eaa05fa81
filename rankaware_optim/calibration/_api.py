"""Calibration: a short Optuna study of one number, the base rate, at several ranks at once, becomes a recipe."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import optuna
from torch.optim import Optimizer

from .._checks import check_lr, is_number, is_positive, is_whole
from .._optimizer_classes import get_optimizer_class
from .._types import Method
from ..errors import CalibrationError, CalibrationInterrupted
from ..laws import Law, get_law
from ..recipe import Recipe
from ._code import train_source
from ._progress import TrialLog, progress_shown
from ._ray import RayExecutor, ray_executor, run_on_ray
from ._runner import Runner
from ._schedule import Schedule
from ._storage import shared_storage
from ._study import Study
from ._trial import Train

Spread = Callable[[Callable[[], None]], None]


def calibrate(
    train: Train,
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int | Sequence[int],
    name: str = "calibration",
    law: str | Law = "mua",
    trials: int | None = None,
    budget: int | None = None,
    until: float | None = None,
    full_trials: int = 0,
    target: Method = "lora",
    seeds: Sequence[int] = (0, 1),
    lr_range: tuple[float, float] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    batch: float | None = None,
    warmup: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    target_steps: int | None = None,
    batches: Sequence[float] = (),
    confirm: bool = False,
    executor: Literal["ray"] | RayExecutor | None = None,
) -> Recipe:
    """Find the base rate, its drift in rank and its uncertainty by a short study, as a recipe.

    `train(trial)` is a generator: it builds the model for `trial.rank`, takes `trial.optimizer(model, ...)`, and
    yields a value to minimise every step. `steps` values are taken, then it is closed. A run's score is the
    generator's `return` value if it ends by itself at `trial.steps` with one, else the mean of the last tenth of its
    values (at least 5). Whether it ends is learned in the first trial, by resuming it once more. It may raise
    `optuna.TrialPruned` where a run is not worth going on, or does not fit into memory. Draw everything, data too,
    from `trial.seed`: runs of one rank and seed are then compared without noise, and others are said to be unsteady.

    Trials are spent where they say most: at the highest rank, rates stride outwards from the upper end of usual ones
    until the optimum is bracketed; then runs measure around it at the ranks in turn, four of each at a seed before the
    next. A run is stopped that diverges, or that clearly lags the best one of its rank and seed at the same step: it
    then says where the optimum is not.

    **Calibrate short, train long.** `steps=(250, 1000), target_steps=8000` makes whole runs of 250 and 1,000 steps,
    each with its own warm-up and decay: `trial.steps` says how many. The recipe is for 8,000 steps. A few of the
    shortest runs find the rates, longer ones measure around them, and both say how the best rate moves with the
    length. That is carried on to the target by a slope that is forgotten after a few octaves, and the band grows
    with the distance. `confirm=True` ends with up to three runs at the target's length. `batches=(16, 64), batch=256`
    does the same for the batch: `trial.batch` says which.

    **For full finetuning**, `full_trials=3` ends with three full runs around the rate predicted for it, the surest
    way. From LoRA trials alone, `target="full"` plans for `recipe.at(method="full")`: with Init[B], whose two ranks
    continued to r = n are the best predictor known, trials go to the ranks as the line to r = n weighs them; with
    Init[A] it is the law's point, good to an octave or two.

    **Stopped and resumed.** With `storage=`, the same call goes on where it stopped, killed or not: finished trials
    are kept, the half-done one is run again at its rank, seed and rate. Several processes and machines may make the
    same call with one storage at once: they share the trials, and wait for one another. A killed one's trial is run
    again by another process of its host at once, by another host after five minutes without a sign of life.

    **Under DDP or FSDP** call it on every process. One decides, all see the same rate and prune at the same step,
    values are averaged over the processes, and all return the same recipe.

    **On a Ray cluster** `executor="ray"` runs the trials in tasks of Ray's, by default one a GPU. `storage` is then a
    journal in a folder that every node sees, or a database's URL, and `train` a function of a module that every node
    can import, or of the script itself. Ray starts a killed task again, and its trial is run again as said above.

    Args:
        train: the training loop, as a generator function of a `Trial`.
        optimizer: a torch optimizer class or its name.
        ranks: LoRA ranks to try: the lowest and the highest that you mean to use. None among them tries full
            finetuning. Between them rates are interpolated; outside, the band grows with the distance.
        steps: training steps a trial; or several lengths, rising.
        name: the study's and the recipe's name.
        law: the law that maps rates between ranks; by default µA alone, the fall at Init[B] being the prior's.
        trials: how many runs at `ranks`; by default as many as `budget` pays for, or 8 a rank, length and batch.
        budget: training steps in all, over every trial, pruned and killed ones at what they ran; never exceeded.
        until: octaves; runs at `ranks` end when the 90 % band of the target is narrower.
        full_trials: runs of full finetuning after those at `ranks`, around the rate predicted for it.
        target: "lora", or "full" to plan for full finetuning from LoRA trials.
        seeds: paired across ranks; `trial.seed` seeds torch, numpy and random around each run.
        lr_range: lowest and highest base rate at the first rank; widened when the best sits at an edge.
        sampler, pruner: Optuna's. By default a sampler that brackets, then refines, and `PairedPruner`.
        storage: a file's path for Optuna's journal, an Optuna URL or storage; by default memory.
        batch, warmup: examples a step and share of steps, where known. The rate belongs to them, so they are recorded.
            Nothing is pruned before the warm-up is over.
        target_steps: steps of the run that is meant, for which the recipe is; by default the longest of `steps`.
        batches: examples a step of trials, rising, where they are others than the `batch` that is meant; that is by
            default the largest of them.
        confirm: end with up to three runs at `target_steps`, at the rate found and half an octave to either side, for
            half of `budget` at most.
        seed: of the sampler.
        progress: show a progress bar; by default where standard error is a terminal. The logger
            "rankaware_optim.calibration" has a line for every trial that ended, at INFO.
        executor: "ray" or a `RayExecutor`; by default the trials run in this process.

    Raises:
        CalibrationError: `train`, an argument or the storage is unusable, or every run diverged.
        CalibrationInterrupted: Ctrl-C; finished trials stay in `storage`, and `.recipe` holds their fit.
    """
    call = {**locals(), "executor": None, "progress": False}
    given = {
        "ranks": ranks, "seeds": seeds, "steps": steps, "trials": trials, "budget": budget, "until": until,
        "full_trials": full_trials, "target": target, "batch": batch, "warmup": warmup, "seed": seed, "name": name,
        "target_steps": target_steps, "batches": batches,
    }  # fmt: skip
    for what, value in given.items():
        check_argument(what, value)
    tried = tuple(sorted(ranks, key=lambda r: (r is None, r or 0)))
    lengths = (steps,) if isinstance(steps, int) else tuple(steps)
    meant = batch if batch is not None or not batches else batches[-1]
    schedule = Schedule(
        tried, tuple(seeds), lengths, trials=trials, budget=budget, until=until, full_trials=full_trials, target=target,
        target_steps=lengths[-1] if target_steps is None else target_steps, batches=tuple(batches), batch=meant,
        confirm=confirm,
    )  # fmt: skip
    _check_schedule(schedule)
    spread = None if executor is None else _spread(executor, call, schedule)
    study = Study(
        optimizer=get_optimizer_class(optimizer),
        law=get_law(law),
        ranks=tried,
        steps=lengths,
        seeds=tuple(seeds),
        train=train_source(train),
        lr_range=_octaves(lr_range),
        batch=meant,
        warmup=warmup,
        seed=seed,
        name=name,
        target_steps=schedule.target_steps,
        batches=schedule.batches,
        kind=schedule.kind,
    )
    state = random.getstate()  # importing rich and talking to a database may draw from it
    runner = Runner(study, schedule)
    try:
        runner.open(sampler, pruner, storage)
        return _run(runner, train, progress, spread)
    finally:
        runner.close()
        random.setstate(state)


def _spread(executor: object, call: dict[str, Any], schedule: Schedule) -> Spread:
    """Has workers elsewhere make the same call, which meets theirs in its storage."""
    checked, storage = ray_executor(executor), shared_storage(call["storage"])
    return partial(run_on_ray, checked, partial(calibrate, **{**call, "storage": storage}), schedule.expected())


def _run(runner: Runner, train: Train, progress: bool | None, spread: Spread | None) -> Recipe:
    """Run the trials, for their recipe. Ctrl-C is an error that says how far they came, and holds their recipe.

    spread: has others run them, and calls what it is given now and then.
    """
    study, leads = runner.study, runner.team.leads

    def look() -> None:
        with study.guard():
            log.saw(study.trials(), runner.schedule.expected())

    try:
        log = TrialLog(logs=leads)
        if spread is not None:
            look()
            spread(look)
            look()
            return runner.recipe()
        with progress_shown(progress if leads else False) as show:
            while (begun := runner.begin()) is not None:
                runner.one(begun, train, show, log.ended)
        return runner.recipe()
    except KeyboardInterrupt as interrupt:
        if not leads:
            raise
        with study.guard():
            error = CalibrationInterrupted(
                f"The calibration was interrupted after {len(study.trials().counted())} of "
                f"{runner.schedule.expected()} trials.",
                "Their fit is this error's .recipe; with storage= the same call goes on where it stopped.",
            )
            error.recipe = study.recipe() if study.fit() is not None else None
            raise error from interrupt


# --- arguments ------------------------------------------------------------------------------------------------------


def _is_distinct(values: object, fits: Callable[[Any], bool]) -> bool:
    """Whether `values` is a sequence of distinct values that all fit, one at least."""
    return isinstance(values, Sequence) and 0 < len(values) == len({*filter(fits, values)})


# What an argument must be, and what to give instead.
_COUNT = (is_whole, "Give a whole number of at least 1.")
_COUNT_OR_NONE = (lambda v: v is None or is_whole(v), _COUNT[1])
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ranks": (
        lambda v: _is_distinct(v, lambda rank: rank is None or is_whole(rank)),
        "Give distinct positive whole numbers, such as (4, 64), and None for full.",
    ),
    "seeds": (
        lambda v: _is_distinct(v, lambda seed: is_whole(seed, -(2**63) + 1) and seed < 2**63),
        "Give distinct whole numbers, such as (0, 1).",
    ),
    "steps": (
        lambda v: is_whole(v) or (_is_distinct(v, is_whole) and list(v) == sorted(v)),
        "Give a whole number of at least 1, or several that rise, such as (250, 1000).",
    ),
    "target_steps": _COUNT_OR_NONE,
    "batches": (
        lambda v: v == () or (_is_distinct(v, is_positive) and list(v) == sorted(v)),
        "Give positive numbers that rise, such as (16, 64), or leave it out.",
    ),
    "trials": _COUNT_OR_NONE,
    "budget": _COUNT_OR_NONE,
    "full_trials": (lambda v: is_whole(v, 0), _COUNT[1]),
    "until": (lambda v: v is None or is_positive(v), "Give octaves, such as 1.0, or leave it out."),
    "target": (lambda v: v in ("lora", "full"), "Give 'lora' or 'full'."),
    "batch": (lambda v: v is None or is_positive(v), "Give a positive number, or leave it out."),
    "warmup": (
        lambda v: v is None or (is_number(v) and 0 <= v <= 1),
        "Give a share of the steps, 0 to 1, or leave it out.",
    ),
    "seed": (lambda v: is_whole(v, 0) and v < 2**32, "Give a whole number from 0 to 2³² - 1."),
    "name": (lambda v: isinstance(v, str) and v != "", "Give a name, such as 'digits'."),
}


def check_argument(what: str, value: object) -> None:
    """Refuse what an argument of `calibrate` cannot be by itself."""
    fits, cure = _ARGUMENTS[what]
    if not fits(value):
        raise CalibrationError(f"{what} is {value!r}.", cure)


def _check_schedule(schedule: Schedule) -> None:
    """Refuse arguments that do not go together."""
    longest, least = schedule.steps[-1], schedule.least()
    if schedule.target_steps < longest:
        raise CalibrationError(
            f"target_steps={schedule.target_steps} is less than the {longest} steps of a trial.",
            "Leave out the lengths beyond it: trials say nothing more by being longer than the run that is meant.",
        )
    if schedule.confirm and schedule.target_steps == longest:
        raise CalibrationError(
            f"confirm=True runs {longest} steps, which the search does already.", "Leave it out, or give target_steps=."
        )
    if schedule.budget is not None and schedule.budget < least:
        runs = 1 + schedule.full_trials + schedule.confirms
        raise CalibrationError(
            f"budget={schedule.budget} does not pay for {runs} run{'s' * (runs > 1)}, {least} steps in all.",
            f"Give {least} training steps at least; thirty runs in all are plenty.",
        )
    if schedule.full_trials and None in schedule.ranks:
        raise CalibrationError(
            f"full_trials={schedule.full_trials} comes after trials of LoRA, and None is among the ranks already.",
            "Leave one of the two out.",
        )
    if schedule.target == "full" and schedule.ranks == (None,):
        raise CalibrationError("target='full' plans LoRA trials, and ranks holds none.", "Give two LoRA ranks.")


def _octaves(lr_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """log2 of the two rates."""
    if lr_range is None:
        return None
    is_pair = isinstance(lr_range, Sequence) and not isinstance(lr_range, str) and len(lr_range) == 2
    low, high = (check_lr(lr, "lr_range") for lr in lr_range) if is_pair else (1.0, 1.0)
    if low >= high:
        raise CalibrationError(f"lr_range is {lr_range!r}.", "Give two rates, the lower first.")
    return math.log2(low), math.log2(high)
