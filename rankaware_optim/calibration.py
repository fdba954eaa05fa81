"""Calibration: a short Optuna study of one number, the base rate, at several ranks at once, becomes a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from .construction import get_optimizer_class
from .errors import CalibrationError
from .groups import check_lr
from .laws import Law, get_law
from .recipe import Recipe
from .study import Study
from .trial import Train, Trial

if TYPE_CHECKING:
    import optuna

__all__ = ["CalibrationInterrupted", "Trial", "calibrate"]

_TRIALS_PER_RANK = 8


class CalibrationInterrupted(CalibrationError, KeyboardInterrupt):
    """Ctrl-C during a calibration. `recipe` is the fit of the finished trials, or None if there were too few."""

    recipe: Recipe | None = None


def calibrate(
    train: Train,
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int,
    name: str = "calibration",
    law: str | Law = "mua",
    trials: int | None = None,
    seeds: Sequence[int] = (0, 1),
    lr_range: tuple[float, float] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | optuna.storages.BaseStorage | None = None,
    batch: float | None = None,
    warmup: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Recipe:
    """Find the base rate, its drift in rank and its uncertainty by a short study, as a recipe.

    `train(trial)` is a generator: it builds the model for `trial.rank`, takes `trial.optimizer(model, ...)`, and
    yields a value to minimise every step. `steps` values are taken, then it is closed. A run's score is the
    generator's `return` value if it ends by itself at `trial.steps` with one, else the mean of the last tenth of its
    values (at least 5). Whether it ends is learned in the first trial, by resuming it once more.

    Args:
        train: the training loop, as a generator function of a `Trial`.
        optimizer: a torch optimizer class or its name.
        ranks: LoRA ranks to try, two at least 16 apart tell most; None among them tries full finetuning.
        steps: training steps a trial.
        name: the study's and the recipe's name.
        law: the law that maps rates between ranks.
        trials: how many runs in all; default 8 a rank.
        seeds: paired across ranks; `trial.seed` seeds torch, numpy and random around each run.
        lr_range: lowest and highest base rate at the first rank; widened when the best sits at an edge.
        sampler, pruner, storage: Optuna's. The default sampler brackets, then refines; the default pruner none.
        batch, warmup: examples a step and share of steps, if told: they are recorded, since the rate belongs to them.
        seed: of the sampler.
        progress: show a progress bar; by default where standard error is a terminal.

    Raises:
        CalibrationError: `train` or an argument is unusable, or every run diverged.
        CalibrationInterrupted: Ctrl-C; finished trials stay in `storage`, and `.recipe` holds their fit.
    """
    ranks, seeds = _check_ranks(ranks), _check_seeds(seeds)
    count = _check_count("trials", trials if trials is not None else _TRIALS_PER_RANK * len(ranks))
    run = Study(
        optimizer=get_optimizer_class(optimizer),
        law=get_law(law),
        ranks=ranks,
        seeds=seeds,
        steps=_check_count("steps", steps),
        lr_range=_check_range(lr_range),
        batch=_check_batch(batch),
        warmup=_check_warmup(warmup),
        seed=_check_seed(seed),
        name=_check_name(name),
    )
    run.open(sampler, pruner, storage)
    with _interruptible(run, count), _progress(count, progress) as show:
        while len(run.trials()) < count:
            run.one(train, show)
    return run.recipe()


@contextmanager
def _interruptible(run: Study, count: int) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        done = len(run.trials())
        error = CalibrationInterrupted(
            f"The calibration was interrupted after {done} of {count} trials.",
            "Their fit is this error's .recipe; with storage= the same call goes on where it stopped.",
        )
        error.recipe = run.recipe() if run.fit() is not None else None
        raise error from interrupt


@contextmanager
def _progress(total: int, wanted: bool | None) -> Iterator[Callable[..., None]]:
    """A function that shows where a trial stands: rank, rate, value, time left; or one that does nothing."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal if wanted is None else wanted):
        yield lambda trial, curve: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("trial {task.fields[trial]}/{task.fields[of]} · {task.fields[what]}")
    with Progress(text, BarColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("calibrate", total=None, trial=0, of=total, what="starting")
        began: list[int] = []

        def show(trial: Trial, curve: list[float]) -> None:
            if trial.number not in began:
                began.append(trial.number)
            rank = "full" if trial.rank is None else f"rank {trial.rank}"
            done = (len(began) - 1) * trial.steps + len(curve)
            what = f"{rank} · base rate {trial.lr:.2g} · value {curve[-1]:.4g}"
            bar.update(task, completed=done, total=total * trial.steps, trial=len(began), what=what)

        yield show


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
