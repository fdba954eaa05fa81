"""Trials with Lightning's `Trainer`, of `lightning` or `pytorch_lightning`. Importing this module
imports neither.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch

from ..errors import CalibrationError, OptimizerError
from ._rates import group_rates, recipe_words
from ._trainer_run import TrainerRun


def lightning_rates() -> Any:
    """Return a callback for Lightning's `Trainer` that logs every group's rate. LearningRateMonitor
    logs base rates::

        trainer = Trainer(callbacks=[LearningRateMonitor(), lightning_rates()])

    They are logged as often as the trainer logs. With several optimizers the names start with the
    optimizer's number. A recipe's name and hash are logged as hyperparameters, "rankaware/recipe"
    and "rankaware/recipe_hash".

    Raises:
        OptimizerError: neither lightning nor pytorch_lightning is installed.
    """
    for package in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            callbacks = import_module(f"{package}.callbacks")
            break
    else:
        raise OptimizerError(
            "lightning_rates is for Lightning, which is not installed.", "Install it."
        )

    class Rates(callbacks.Callback):  # type: ignore[name-defined]
        """Logs the recipe, and the rates of the next step."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            words = {
                key: word for opt in trainer.optimizers for key, word in recipe_words(opt).items()
            }
            for logger in trainer.loggers if words else ():
                logger.log_hyperparams(words)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if not trainer._logger_connector.should_update_logs:  # as LearningRateMonitor does
                return
            several = len(trainer.optimizers) > 1
            named = (
                (f"{i}/" if several else "", group_rates(opt))
                for i, opt in enumerate(trainer.optimizers)
            )
            rates = {
                f"{start}{name}": rate for start, found in named for name, rate in found.items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    return Rates()


def fit(trainer: Any, module: Any, data: Sequence[Any], run: TrainerRun) -> Any:
    """Run the trial by `trainer.fit` and return its score, or None if there is none."""
    base = next((c for c in type(module).__mro__ if c.__name__ == "LightningModule"), None)
    if base is None:
        raise CalibrationError(
            f"make_trainer returned a {type(module).__name__} instead of Lightning's module.",
            "Return (trainer, module, loaders or datamodule).",
        )
    callbacks = import_module(f"{base.__module__.rpartition('.core')[0]}.callbacks")
    _set_optimizer(module, base, run)
    _set_steps(trainer.fit_loop, run)

    class Reports(callbacks.Callback):  # type: ignore[name-defined]
        """Reports every step, and stops the trainer when the trial ends."""

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if not isinstance(loss, torch.Tensor):
                raise CalibrationError(
                    "The module's training_step returned no loss.",
                    "Return it, also with manual optimization.",
                )
            run.add(loss)
            if trainer.global_step > run.steps_taken and run.end_step():
                trainer.should_stop = True

    def validated() -> dict[str, Any]:
        """Return the metrics of the datamodule, or of the loaders after the training loaders."""
        loaders = data[1:2] if len(data) > 1 else data
        found = trainer.validate(module, *loaders, verbose=False)
        return {name: value for metrics in found for name, value in metrics.items()}

    kept = [
        callback for callback in trainer.callbacks if not isinstance(callback, callbacks.Checkpoint)
    ]
    trainer.callbacks = [*kept, Reports()]
    with _interrupts_come_out():
        trainer.fit(module, *data)
        return run.score(trainer, validated)


def _set_optimizer(module: Any, base: Any, run: TrainerRun) -> None:
    """Give the trial's optimizer to a module that configures none."""
    if type(module).configure_optimizers is base.configure_optimizers:
        module.configure_optimizers = lambda: run.optimizer(module)
    elif run.settings:
        raise CalibrationError(
            f"settings= was given, but {type(module).__name__} configures its optimizer itself.",
            "Give them there: trial.optimizer(self, ...).",
        )


def _set_steps(loop: Any, run: TrainerRun) -> None:
    """Let the trainer end after a number of steps instead of epochs."""
    own = loop.epoch_loop.max_steps
    loop.epoch_loop.max_steps = run.steps_of(own if own >= 0 else None)
    loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None


@contextmanager
def _interrupts_come_out() -> Iterator[None]:
    """Pass Ctrl-C to the caller. Lightning would exit the process and ignore further interrupts."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from end
