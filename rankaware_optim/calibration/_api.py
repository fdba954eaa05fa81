"""Calibration: a short Optuna study of the base rate at several ranks, whose result is a recipe."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import optuna
from torch.optim import Optimizer

from .._checks import MOST_RANKS, check_lr, is_number, is_positive, is_whole, plain
from .._optimizers import get_optimizer_class
from .._warn import warn
from ..errors import CalibrationError, CalibrationInterrupted
from ..laws import PRIOR_LAW, Law, get_law
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
    until: float | None = None,
    full_trials: int = 0,
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
    executor: Literal["ray"] | RayExecutor | None = None,
) -> Recipe:
    """Find the base rate, its drift in rank and its uncertainty by a short study, and return them
    as a recipe.

    `train(trial)` is a generator. It builds the model for `trial.rank`, gets
    `trial.optimizer(model, ...)`, and yields a value to minimise at every step. It is closed after
    `trial.steps` values. If it ends by itself at `trial.steps` and returns a number, this is the
    run's score. Otherwise the score is the mean of the last tenth of its values (at least 5). It
    may raise `optuna.TrialPruned` to stop a run. Draw all random numbers, the data included, from
    `trial.seed`. Runs of one rank and seed can then be compared without noise. A recipe notes if
    they cannot.

    The search starts at the highest rank and above the usual rates. It moves outwards in steps of
    two octaves until the optimum is bracketed. The following runs measure around the optimum, at
    each rank in turn, with four runs per seed. A run is stopped if it diverges, that is, if its
    loss rises above its start by half the best gain and by more than the noise of its batches
    explains. It is also stopped if it clearly lags behind the best run of its rank and seed at the
    same step. Stopped runs enter the fit too.

    **Calibrate short, train long.** `steps=2000, target_steps=8000` trains for 2000 steps and
    returns a recipe for 8000. Every trial is a whole run with its own warm-up and decay over
    `trial.steps`. The rate is then moved by what other tasks showed, and the band grows with the
    distance to the target. A trial should have an eighth of the target's steps, and a hundred at
    least.

    **Full finetuning.** `full_trials=3` adds three full runs around the predicted rate. This is the
    most reliable way. With LoRA trials only, `recipe.at(method="full")` has a wide band. With
    Init[A] (B starts at zero, as in PEFT) the rate follows from the law. With Init[B] (A starts at
    zero) the line through the optima of two ranks is extended to r = n.

    **Resuming.** With `storage=`, the same call continues where it stopped, even if it was killed.
    Finished trials are kept. An unfinished trial is repeated at its rank, seed and rate. Several
    processes and machines may make the same call with one storage at the same time. They share the
    trials and wait for each other. A process that ends by Ctrl-C or an error gives its trial back
    at once. One that is killed or suspended writes no more heartbeats. Within a minute its trial is
    repeated by another process, on any host, or by the same call. If it wakes up, its run does not
    count.

    **DDP and FSDP.** Call it on every process. One process decides. All get the same rate, prune at
    the same step and return the same recipe. Values are averaged over the processes.

    **Ray.** `executor="ray"` runs the trials in Ray tasks, by default one per GPU. `storage` must
    then be a journal in a folder that every node shares, or a database URL. `train` must be
    importable on every node, or defined in the script. Ray restarts a killed task, and its trial is
    repeated as described above.

    Args:
        train: the training loop, a generator function of a `Trial`.
        optimizer: a torch optimizer class or its name.
        ranks: LoRA ranks to try: the lowest and the highest that you want to use. None stands for
            full finetuning. Rates are interpolated between the ranks. Outside them the band grows
            with the distance.
        steps: optimizer steps per trial.
        name: the name of the study and of the recipe.
        law: the law that maps rates between ranks, by default µA with 8 tokens. The fall in rank at
            Init[B] is in the fit's prior.
        trials: number of runs at `ranks`. By default as many as `budget` allows, or 8 per rank.
        budget: optimizer steps of all trials together, never exceeded. Pruned and killed trials
            count the steps they ran.
        until: the search ends when the 90 % band of the target is narrower than this, octaves.
        full_trials: number of full-finetuning runs after those at `ranks`, around the predicted
            rate.
        seeds: random seeds, the same for all ranks. `trial.seed` seeds torch, numpy and random for
            each run.
        lr_range: lowest and highest base rate at the first rank. It is widened if the best rate is
            at an edge.
        sampler: an Optuna sampler. By default it brackets the optimum and then refines it.
        pruner: an Optuna pruner, by default `PairedPruner`.
        storage: path of a journal file, or an Optuna URL or storage. By default the study is kept
            in memory.
        batch: examples per step of the target run, if known. The rate belongs to it, so the recipe
            records it.
        warmup: share of the steps with a rising rate, from 0 to 1, if known. Nothing is pruned
            before its end.
        seed: random seed of the sampler.
        progress: whether to show a progress bar. By default it is shown if standard error is a
            terminal. The logger "rankaware_optim.calibration" reports every finished trial at level
            INFO.
        target_steps: number of steps of the target run, by default `steps`.
        executor: "ray" or a `RayExecutor`. By default the trials run in this process.

    Returns:
        The recipe for the target run.

    Raises:
        CalibrationError: `train`, an argument or the storage cannot be used, or every run diverged.
        CalibrationInterrupted: Ctrl-C. Finished trials stay in `storage`, and `.recipe` holds their
            fit.
    """
    ranks, steps, seeds, lr_range = map(plain, (ranks, steps, seeds, lr_range))
    trials, budget, until, full_trials = map(plain, (trials, budget, until, full_trials))
    batch, warmup, seed, target_steps = map(plain, (batch, warmup, seed, target_steps))
    call = {**locals(), "executor": None, "progress": False}
    given = {
        "ranks": ranks, "seeds": seeds, "steps": steps, "trials": trials, "budget": budget, "until": until,
        "full_trials": full_trials, "batch": batch, "warmup": warmup, "seed": seed, "name": name,
        "target_steps": target_steps,
    }  # fmt: skip
    for what, value in given.items():
        check_argument(what, value)
    tried = tuple(sorted(ranks, key=lambda r: (r is None, r or 0)))
    schedule = Schedule(
        tried,
        tuple(seeds),
        steps,
        trials=trials,
        budget=budget,
        until=until,
        full_trials=full_trials,
    )
    meant = steps if target_steps is None else target_steps
    _check_schedule(schedule, meant)
    spread = None if executor is None else _spread(executor, call, schedule)
    study = Study(
        optimizer=get_optimizer_class(optimizer),
        law=get_law(law),
        ranks=tried,
        steps=steps,
        seeds=tuple(seeds),
        train=train_source(train),
        lr_range=_octaves(lr_range),
        batch=batch,
        warmup=warmup,
        seed=seed,
        name=name,
        target_steps=meant,
        full_follows=full_trials > 0,
    )
    state = random.getstate()  # importing rich and using a database may draw from it
    runner = Runner(study, schedule)
    try:
        runner.open(sampler, pruner, storage)
        return _run(runner, train, progress, spread)
    finally:
        runner.close()
        random.setstate(state)


def _spread(executor: object, call: dict[str, Any], schedule: Schedule) -> Spread:
    """Return a function that lets remote workers make the same call. They meet in its storage."""
    checked, storage = ray_executor(executor), shared_storage(call["storage"])
    return partial(
        run_on_ray, checked, partial(calibrate, **{**call, "storage": storage}), schedule.expected()
    )


def _run(runner: Runner, train: Train, progress: bool | None, spread: Spread | None) -> Recipe:
    """Run the trials and return their recipe. Ctrl-C raises an error with the progress and the
    recipe so far.

    spread: lets remote workers run the trials, and calls its argument at intervals.
    """
    study, leads = runner.study, runner.team.leads

    if leads and (caution := runner.schedule.caution()):
        warn(caution)

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
                "Their fit is this error's .recipe. With a storage the same call continues where it"
                " stopped.",
            )
            error.recipe = study.recipe() if study.fit() is not None else None
            raise error from interrupt


# --- arguments ------------------------------------------------------------------------------------


def _is_distinct(values: object, fits: Callable[[Any], bool]) -> bool:
    """Return whether `values` is a non-empty sequence of distinct values that all fit."""
    return isinstance(values, Sequence) and 0 < len(values) == len({*filter(fits, values)})


# A check of each argument, and the cure in the error message.
_COUNT = (is_whole, "Give a whole number of at least 1.")
_COUNT_OR_NONE = (lambda v: v is None or is_whole(v), _COUNT[1])
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ranks": (
        lambda v: (
            _is_distinct(v, lambda rank: rank is None or is_whole(rank)) and len(v) <= MOST_RANKS
        ),
        (
            f"Give at most {MOST_RANKS} distinct positive whole numbers, such as (4, 64), and None"
            " for full."
        ),
    ),
    "seeds": (
        lambda v: _is_distinct(v, lambda seed: is_whole(seed, -(2**63) + 1) and seed < 2**63),
        "Give distinct whole numbers, such as (0, 1).",
    ),
    "steps": _COUNT,
    "target_steps": _COUNT_OR_NONE,
    "trials": _COUNT_OR_NONE,
    "budget": _COUNT_OR_NONE,
    "full_trials": (lambda v: is_whole(v, 0), _COUNT[1]),
    "until": (lambda v: v is None or is_positive(v), "Give octaves, such as 1.0, or leave it out."),
    "batch": (lambda v: v is None or is_positive(v), "Give a positive number, or leave it out."),
    "warmup": (
        lambda v: v is None or (is_number(v) and 0 <= v <= 1),
        "Give a share of the steps, 0 to 1, or leave it out.",
    ),
    "seed": (lambda v: is_whole(v, 0) and v < 2**32, "Give a whole number from 0 to 2³² - 1."),
    "name": (
        lambda v: isinstance(v, str) and v != "" and v.isprintable(),
        "Give a name of printable characters, such as 'digits'.",
    ),
}


def check_argument(what: str, value: object) -> None:
    """Raise a `CalibrationError` if a single argument of `calibrate` is impossible."""
    fits, cure = _ARGUMENTS[what]
    if not fits(value):
        raise CalibrationError(f"{what} is {value!r}.", cure, what)


def _check_schedule(schedule: Schedule, target_steps: int) -> None:
    """Raise a `CalibrationError` if arguments contradict each other."""
    least = schedule.least()
    if target_steps < schedule.steps:
        raise CalibrationError(
            f"target_steps={target_steps} is less than the {schedule.steps} steps of a trial.",
            "Lower a trial's steps: an eighth of the target's is enough, if that is a hundred.",
            "target_steps",
        )
    if schedule.budget is not None and schedule.budget < least:
        runs = 1 + schedule.full_trials
        raise CalibrationError(
            f"budget={schedule.budget} is too small for {runs} run{'s' * (runs > 1)}, {least} steps"
            " in all.",
            f"Give at least {least} training steps. Thirty runs are usually enough.",
            "budget",
        )
    if schedule.full_trials and None in schedule.ranks:
        raise CalibrationError(
            f"full_trials={schedule.full_trials} follows trials of LoRA, but None is already among"
            " the ranks.",
            "Leave one of the two out.",
            "full_trials",
        )


def _octaves(lr_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return log2 of the two rates."""
    if lr_range is None:
        return None
    is_pair = (
        isinstance(lr_range, Sequence) and not isinstance(lr_range, str) and len(lr_range) == 2
    )
    low, high = (check_lr(lr, "lr_range") for lr in lr_range) if is_pair else (1.0, 1.0)
    if low >= high:
        raise CalibrationError(
            f"lr_range is {lr_range!r}.", "Give two rates, the lower first.", "lr_range"
        )
    return math.log2(low), math.log2(high)
