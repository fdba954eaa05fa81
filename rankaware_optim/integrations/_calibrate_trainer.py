"""Calibration with a trainer of transformers, TRL or Lightning.

The trainer runs in the caller's thread. A callback reports each step's loss and stops it. Importing
this module imports none of these packages.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.optim import Optimizer

from .._optimizers import get_optimizer_class
from ..calibration import Pushed, Trial, calibrate, release_memory, seeded
from ..errors import CalibrationError
from ..recipe import Recipe
from ._trainer_run import TrainerRun, run_lightning, run_transformers


def calibrate_trainer(
    make_trainer: Callable[[Trial], Any],
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int,
    settings: Mapping[str, Any] | None = None,
    score: str | Callable[[Any], Any] | None = None,
    **options: Any,
) -> Recipe:
    """Calibrate with a trainer. Every trial is a run of its `train` or `fit`::

        def make_trainer(trial):
            model = get_peft_model(load(), LoraConfig(r=trial.rank, lora_alpha=trial.rank))
            return Trainer(model, TrainingArguments("runs", report_to="none"), train_dataset=data)

        recipe = ra.calibrate_trainer(make_trainer, torch.optim.AdamW, ranks=(4, 64), steps=200)

    For transformers and TRL, `make_trainer` returns a trainer that is not trained and has no
    optimizer. It gets one at the trial's rate, and the trial's seed. Weight decay, betas and
    epsilon come from its arguments unless `settings` has them. Its scheduler, clipping,
    accumulation and callbacks are used. The schedule spans `max_steps` if it is set, else the
    trial's steps. Checkpoints and pushes to the hub are disabled. Your arguments object is not
    changed.

    For Lightning, `make_trainer` returns (trainer, module, and the arguments of `fit` after the
    module: loaders or a datamodule). The module's `configure_optimizers` gets its optimizer from
    `trial.optimizer(self, ...)` and adds its schedule. A module without that method gets the
    optimizer at a constant rate. The number of steps replaces the trainer's epochs.

    The value of a step is its training loss, summed over accumulated batches with the trainer's
    weights. A callback prunes runs. The global random state, os.environ, loggers and warning
    filters are restored at the end.

    Args:
        make_trainer: returns the trainer for a `Trial`, with a model at `trial.rank`, or for full
            finetuning if it is None.
        optimizer: as in `calibrate`.
        ranks: as in `calibrate`.
        steps: as in `calibrate`.
        settings: the optimizer's own arguments, and those of `RankAwareOptimizer` such as rates=.
        score: the evaluation metric to minimise after the last step ("eval_loss", or the name that
            Lightning's module logs), or a function of the trained trainer. By default it is the
            mean of the last tenth of the losses.
        **options: other arguments of `calibrate`.

    Returns:
        The recipe.

    Raises:
        CalibrationError: the trainer is of another kind, has an optimizer, or ends too early; or as
            in `calibrate`.
        CalibrationInterrupted: Ctrl-C.
    """
    if not callable(make_trainer) or not (
        score is None or isinstance(score, str) or callable(score)
    ):
        raise CalibrationError(
            f"calibrate_trainer got make_trainer={make_trainer!r} and score={score!r}.",
            "Give a function of the trial, and the name of a metric or a function of the trainer.",
        )

    native = get_optimizer_class(optimizer)

    @wraps(make_trainer)
    def pushed(trial: Trial) -> Pushed:
        return Pushed(
            lambda report: _run(
                make_trainer, TrainerRun(trial, native, settings or {}, score, report)
            )
        )

    with seeded(0), _surroundings():
        return calibrate(pushed, optimizer, ranks=ranks, steps=steps, **options)


def _run(make_trainer: Callable[[Trial], Any], run: TrainerRun) -> Any:
    """Run one trial and return its score, or None if there is none."""
    # the only reference, so that its memory is released before the next trial
    trainer = make_trainer(run.trial)
    try:
        if (
            isinstance(trainer, tuple)
            and len(trainer) >= 2
            and hasattr(trainer[0], "fit_loop")
        ):
            return run_lightning(trainer[0], trainer[1], trainer[2:], run)
        if hasattr(trainer, "callback_handler") and hasattr(trainer, "training_step"):
            return run_transformers(trainer, run)
    finally:
        del trainer
        release_memory()
    raise CalibrationError(
        "make_trainer returned no known trainer.",
        "Return a Trainer of transformers or TRL, or a tuple of Lightning's Trainer, module and"
        " data.",
    )


@contextmanager
def _surroundings() -> Iterator[None]:
    """Restore at the end what trainers change: os.environ, loggers and warning filters."""
    environment = dict(os.environ)
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    states = [
        (logger, logger.level, logger.propagate, logger.disabled, [*logger.handlers])
        for logger in loggers
        if isinstance(logger, logging.Logger)
    ]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for logger, level, propagate, disabled, handlers in states:
                logger.setLevel(level)
                logger.propagate, logger.disabled = propagate, disabled
                logger.handlers[:] = handlers
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
