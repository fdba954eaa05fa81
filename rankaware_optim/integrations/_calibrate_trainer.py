"""Calibration through somebody else's trainer: transformers' `Trainer`, TRL's and Lightning's.

The trainer runs in the caller's thread and reports each step's loss through a callback, by which it is also stopped.
Importing this module imports none of them.
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

from .._optimizer_classes import get_optimizer_class
from ..calibration import Pushed, Trial, calibrate, release_memory, seeded
from ..errors import CalibrationError
from ..recipe import Recipe
from ._lightning import fit
from ._trainer_run import TrainerRun
from ._transformers import train


def calibrate_trainer(
    make_trainer: Callable[[Trial], Any],
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int | Sequence[int],
    settings: Mapping[str, Any] | None = None,
    score: str | Callable[[Any], Any] | None = None,
    **options: Any,
) -> Recipe:
    """`calibrate` where the training loop is a trainer's: every trial is a run of its `train` or `fit`.

        def make_trainer(trial):
            model = get_peft_model(load(), LoraConfig(r=trial.rank, lora_alpha=trial.rank))
            return Trainer(model, TrainingArguments("runs", report_to="none"), train_dataset=data)

        recipe = ra.calibrate_trainer(make_trainer, torch.optim.AdamW, ranks=(4, 64), steps=200)

    transformers and TRL: `make_trainer` returns the trainer, not trained and without an optimizer of its own. It is
    given one at the trial's rate, with the weight decay, betas and epsilon of its arguments unless `settings` has them,
    and the trial's seed in place of theirs. Its scheduler, clipping, accumulation and callbacks are as ever; the
    schedule spans its `max_steps`, or `steps` where it sets none.
    Checkpoints and the push to the hub are off; the arguments that you hold are not changed.

    Lightning: it returns (trainer, module, and what `fit` takes after the module: loaders or a datamodule). The
    module's `configure_optimizers` takes its optimizer from `trial.optimizer(self, ...)` and adds its schedule; a
    module without one is given it, at a constant rate. The trainer's epochs do not count, `steps` do.

    The value of a step is its training loss, summed over accumulated batches as the trainer weights them. A run is
    pruned by the callback. The global random state, os.environ, loggers and warning filters are put back in the end.

    Args:
        make_trainer: from the `Trial` to the trainer, around a model at `trial.rank`, or a whole one where it is None.
        optimizer, ranks, steps: as in `calibrate`.
        settings: the optimizer's own arguments, and those of `RankAwareOptimizer` such as rates=.
        score: the evaluation metric to minimise after the last step ("eval_loss", or the name that Lightning's module
            logs), or a function of the trained trainer; by default the mean of the last tenth of the losses.
        **options: of `calibrate`.

    Raises:
        CalibrationError: the trainer is none of these, holds an optimizer, or ends before `steps`; or as `calibrate`.
        CalibrationInterrupted: Ctrl-C.
    """
    if not callable(make_trainer) or not (score is None or isinstance(score, str) or callable(score)):
        raise CalibrationError(
            f"calibrate_trainer got make_trainer={make_trainer!r} and score={score!r}.",
            "Give a function of the trial, and the name of a metric or a function of the trainer.",
        )

    native = get_optimizer_class(optimizer)

    @wraps(make_trainer)
    def pushed(trial: Trial) -> Pushed:
        return Pushed(lambda report: _run(make_trainer, TrainerRun(trial, native, settings or {}, score, report)))

    with seeded(0), _surroundings():
        return calibrate(pushed, optimizer, ranks=ranks, steps=steps, **options)


def _run(make_trainer: Callable[[Trial], Any], run: TrainerRun) -> Any:
    """One trial: its score, or None where there is none to take."""
    made = make_trainer(run.trial)  # the only reference, so that its memory is free for the next trial
    try:
        if isinstance(made, tuple) and len(made) >= 2 and hasattr(made[0], "fit_loop"):
            return fit(made[0], made[1], made[2:], run)
        if hasattr(made, "callback_handler") and hasattr(made, "training_step"):
            return train(made, run)
    finally:
        del made
        release_memory()
    raise CalibrationError(
        "make_trainer returned no trainer that is known.",
        "Return transformers' or TRL's Trainer, or a tuple of Lightning's Trainer, module and data.",
    )


@contextmanager
def _surroundings() -> Iterator[None]:
    """Put what trainers change around them back at the end: os.environ, the known loggers, the warning filters."""
    environment = dict(os.environ)
    known = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    found = [(x, x.level, x.propagate, x.disabled, list(x.handlers)) for x in (logging.getLogger(), *known)]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for logger, level, propagate, disabled, handlers in found:
                logger.setLevel(level)
                logger.propagate, logger.disabled, logger.handlers[:] = propagate, disabled, handlers
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
