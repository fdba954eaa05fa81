"""Calibration through somebody else's trainer: transformers' `Trainer` and TRL's, which subclass it, and Lightning's.

The trainer runs in the caller's thread and reports each step's loss through a callback, by which it is also stopped.
Importing this module imports neither of them.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer

from ..calibration import Pushed, Trial, calibrate, release_memory, seeded
from ..errors import CalibrationError
from ..recipe import Recipe

__all__ = ["calibrate_trainer"]

Report = Callable[[Any], bool]
Score = str | Callable[[Any], Any] | None


def calibrate_trainer(
    make_trainer: Callable[[Trial], Any],
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int,
    settings: Mapping[str, Any] | None = None,
    score: Score = None,
    **options: Any,
) -> Recipe:
    """`calibrate` where the training loop is a trainer's: every trial is a run of its `train` or `fit`.

        def make_trainer(trial):
            model = get_peft_model(load(), LoraConfig(r=trial.rank, lora_alpha=trial.rank))
            return Trainer(model, TrainingArguments("runs", report_to="none"), train_dataset=data)

        recipe = ra.calibrate_trainer(make_trainer, torch.optim.AdamW, ranks=(4, 64), steps=200)

    transformers and TRL: `make_trainer` returns the trainer, not trained and without an optimizer of its own. It is
    given one at the trial's rate, and the trial's seed in place of its arguments'. Its scheduler, clipping,
    accumulation and callbacks are as ever; the schedule spans its `max_steps`, or `steps` where it sets none.
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
    own = dict(settings or {})

    def train(trial: Trial) -> Pushed:
        return Pushed(lambda report: _run(make_trainer, trial, own, score, report))

    with seeded(0), _surroundings():
        return calibrate(train, optimizer, ranks=ranks, steps=steps, **options)


def _run(
    make_trainer: Callable[[Trial], Any], trial: Trial, settings: dict[str, Any], score: Score, report: Report
) -> Any:
    """One trial: its score, or None where there is none to take."""
    made = make_trainer(trial)
    try:
        if isinstance(made, tuple) and len(made) >= 2 and hasattr(made[0], "fit_loop"):
            return _fit(made, trial, settings, score, report)
        if hasattr(made, "callback_handler") and hasattr(made, "training_step"):
            return _train(made, trial, settings, score, report)
    finally:
        del made
        release_memory()
    raise CalibrationError(
        "make_trainer returned no trainer that is known.",
        "Return transformers' or TRL's Trainer, or a tuple of Lightning's Trainer, module and data.",
    )


class _Steps:
    """The losses of one step's batches, reported once the step is taken."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._loss: Any = 0.0
        self.taken = 0

    def add(self, loss: torch.Tensor) -> None:
        """A batch's loss, divided by how many there are to a step."""
        self._loss = self._loss + loss.detach()

    def end(self) -> bool:
        """The step is taken; whether the run is to end."""
        loss, self._loss = self._loss, 0.0
        self.taken += 1
        return self._report(loss)


def _metric(found: Mapping[str, Any], name: str) -> Any:
    if name not in found:
        raise CalibrationError(f"The evaluation gave no {name!r}.", f"It gave {', '.join(sorted(found))}.")
    return found[name]


# --- transformers and TRL -------------------------------------------------------------------------------------------


class _Factory:
    """What Trainer takes for a factory of optimizers: it calls it for itself, and the result with the wrapped model."""

    def __init__(self, trial: Trial, settings: dict[str, Any]) -> None:
        self._trial = trial
        self._settings = settings

    def __call__(self, model: Any = None) -> Any:
        return self if model is None else self._trial.optimizer(model, **self._settings)


def _train(trainer: Any, trial: Trial, settings: dict[str, Any], score: Score, report: Report) -> Any:
    from transformers import TrainerCallback, set_seed

    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise CalibrationError(
            "The trainer that make_trainer returned has an optimizer of its own.",
            "Leave optimizers= and optimizer_cls_and_kwargs= out: the trial's is handed to it.",
        )
    trainer.args = _arguments(trainer.args, trial)
    trainer.optimizer_cls_and_kwargs = (_Factory(trial, settings), {})
    steps, training_step = _Steps(report), trainer.training_step

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        steps.add(loss)
        return loss

    class Reports(TrainerCallback):
        """Reports every step, and stops the trainer where the trial ends."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if steps.end():
                control.should_training_stop = True

    trainer.training_step = watched_step
    trainer.add_callback(Reports())
    set_seed(trainer.args.seed)  # the trainer's constructor set that of its arguments
    trainer.train()
    if score is None or steps.taken < trial.steps:
        return None
    return score(trainer) if callable(score) else _metric(trainer.evaluate(), score)


def _arguments(found: Any, trial: Trial) -> Any:
    """The trainer's arguments for one trial: its seed, its steps where they set none, and nothing saved."""
    args = copy.copy(found)
    if 0 < args.max_steps < trial.steps:
        raise CalibrationError(
            f"The trainer's max_steps is {args.max_steps}, less than the trial's {trial.steps}.", "Lower steps=."
        )
    args.max_steps = args.max_steps if args.max_steps > 0 else trial.steps
    args.seed = trial.seed % 2**32
    args.save_strategy = type(args.save_strategy)("no")
    args.load_best_model_at_end = False
    args.push_to_hub = False
    return args


# --- Lightning ------------------------------------------------------------------------------------------------------


def _fit(made: tuple[Any, ...], trial: Trial, settings: dict[str, Any], score: Score, report: Report) -> Any:
    trainer, module, *data = made
    base = next((c for c in type(module).__mro__ if c.__name__ == "LightningModule"), None)
    if base is None:
        raise CalibrationError(
            f"make_trainer returned a {type(module).__name__} where Lightning's module belongs.",
            "Return (trainer, module, loaders or datamodule).",
        )
    callbacks = import_module(f"{base.__module__.rpartition('.core')[0]}.callbacks")
    _hand_optimizer(module, base, trial, settings)
    _limit(trainer, trial.steps)
    steps = _Steps(report)

    class Reports(callbacks.Callback):  # type: ignore[name-defined]
        """Reports every step, and stops the trainer where the trial ends."""

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            steps.add(_loss_of(outputs))
            if trainer.global_step > steps.taken and steps.end():
                trainer.should_stop = True

    kept = [callback for callback in trainer.callbacks if not isinstance(callback, callbacks.Checkpoint)]
    trainer.callbacks = [*kept, Reports()]
    with _interruptions_come_out():
        trainer.fit(module, *data)
        if score is None or steps.taken < trial.steps:
            return None
        return score(trainer) if callable(score) else _metric(_validated(trainer, module, data), score)


def _hand_optimizer(module: Any, base: Any, trial: Trial, settings: dict[str, Any]) -> None:
    if type(module).configure_optimizers is base.configure_optimizers:
        module.configure_optimizers = lambda: trial.optimizer(module, **settings)
    elif settings:
        raise CalibrationError(
            f"settings= were given, and {type(module).__name__} configures its optimizer itself.",
            "Give them there: trial.optimizer(self, ...).",
        )


def _limit(trainer: Any, steps: int) -> None:
    """Let the trainer's steps decide, at least `steps` of them, and no epochs."""
    loop = trainer.fit_loop
    if 0 <= loop.epoch_loop.max_steps < steps:
        raise CalibrationError(
            f"The trainer's max_steps is {loop.epoch_loop.max_steps}, less than the trial's {steps}.", "Lower steps=."
        )
    if loop.epoch_loop.max_steps < 0:
        loop.epoch_loop.max_steps = steps
    loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None


def _loss_of(outputs: Any) -> torch.Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, torch.Tensor):
        raise CalibrationError("The module's training_step returned no loss.", "Return it, optimized by hand or not.")
    return loss


def _validated(trainer: Any, module: Any, data: list[Any]) -> dict[str, Any]:
    """The metrics of a validation: of the datamodule, or of the loaders that follow the training ones."""
    loaders = data[1:2] if len(data) > 1 else data
    found = trainer.validate(module, *loaders, verbose=False)
    return {name: value for metrics in found for name, value in metrics.items()}


@contextmanager
def _interruptions_come_out() -> Iterator[None]:
    """Lightning answers Ctrl-C by leaving the process, deaf to further ones: give the interruption to the caller."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from end


# --- what trainers change around them -------------------------------------------------------------------------------


@contextmanager
def _surroundings() -> Iterator[None]:
    """Put os.environ, the loggers that there are, and the warning filters back at the end."""
    environment = dict(os.environ)
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.getLogger(), *(logger for logger in known if isinstance(logger, logging.Logger))]
    found = [(logger, _switches(logger)) for logger in loggers]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for logger, (level, propagate, disabled, handlers) in found:
                logger.setLevel(level)
                logger.propagate, logger.disabled = propagate, disabled
                logger.handlers[:] = handlers
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


def _switches(logger: Any) -> tuple[int, bool, bool, list[logging.Handler]]:
    return logger.level, logger.propagate, logger.disabled, list(logger.handlers)
