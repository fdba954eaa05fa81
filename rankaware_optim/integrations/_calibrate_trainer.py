"""Calibration with a trainer of transformers, TRL or Lightning.

The trainer runs in the caller's thread. A callback reports each step's loss and stops it. Importing
this module imports none of these packages.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer

from .._optimizers import get_optimizer_class
from ..calibration import Pushed, Trial, calibrate, release_memory
from ..errors import CalibrationError
from ..recipe import Recipe
from ._trainer_factory import TrainerFactory

_BY_REWARD = (
    "a run's value is minus the reward that its trainer logged, and not its loss"
)


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
    changed. The recipe's batch, in examples, and its warm-up are those of the arguments, unless
    `batch` and `warmup` are given.

    For Lightning, `make_trainer` returns (trainer, module, and the arguments of `fit` after the
    module: loaders or a datamodule). The module's `configure_optimizers` gets its optimizer from
    `trial.optimizer(self, ...)` and adds its schedule. A module without that method gets the
    optimizer at a constant rate. The number of steps replaces the trainer's epochs.

    The value of a step is its training loss, summed over accumulated batches with the trainer's
    weights. A trainer with `reward_funcs` (TRL's GRPO and RLOO) has a loss of about zero by
    construction. There the value is minus the reward that it logs, unless `score` is given, and the
    recipe's notes say so. A callback prunes runs. The global random state is restored at the end.

    Args:
        make_trainer: returns the trainer for a `Trial`, with a model at `trial.rank`, or for full
            finetuning if it is None.
        optimizer: as in `calibrate`.
        ranks: as in `calibrate`.
        steps: as in `calibrate`.
        settings: the optimizer's own arguments, and those of `RankAwareOptimizer` such as rates=.
        score: the evaluation metric to minimise after the last step ("eval_loss", or the name that
            Lightning's module logs), or a function of the trained trainer. By default it is the
            mean of the last tenth of the values.
        **options: other arguments of `calibrate`.

    Returns:
        The recipe.

    Raises:
        CalibrationError: the trainer is of another kind, has an optimizer, logs no reward where its
            loss says nothing, or ends too early; or as in `calibrate`.
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
    horizon: dict[str, Any] = {}  # of the trainer's arguments

    @wraps(make_trainer)
    def train(trial: Trial) -> Pushed:
        def run(report: Callable[[Any], bool]) -> Any:
            of_trial = TrainerRun(trial, native, settings or {}, score, report, horizon)
            try:
                return of_trial.by(make_trainer(trial))
            finally:
                release_memory()  # of the trainer, before the next trial

        return Pushed(run)

    recipe = calibrate(train, optimizer, ranks=ranks, steps=steps, **options)
    if recipe.batch is None:
        reference = replace(recipe.reference, batch=horizon.get("batch"))
        recipe = replace(recipe, reference=reference)
    if recipe.warmup is None:
        recipe = replace(recipe, warmup=horizon.get("warmup"))
    if horizon.get("by reward"):
        recipe = replace(recipe, notes=(*recipe.notes, _BY_REWARD))
    return recipe


# --- a trial --------------------------------------------------------------------------------------


@dataclass
class TrainerRun:
    """The trial, the optimizer's class and settings, the score, and the loss of the current step.

    metric: the name of an evaluation metric, a function of the trainer, or None for the mean of the
    last values. report: gets a step's value and returns whether the run must end. horizon: is given
    the batch and the warm-up's share of the arguments, and whether the values are rewards.
    """

    trial: Trial
    native: type[Optimizer]
    settings: Mapping[str, Any]
    metric: str | Callable[[Any], Any] | None
    report: Callable[[Any], bool]
    horizon: dict[str, Any]
    steps_taken: int = 0
    _loss: Any = 0.0

    def by(self, trainer: Any) -> Any:
        """Run the trial by a trainer and return its score, or None if there is none."""
        if isinstance(trainer, tuple) and len(trainer) >= 2:
            lightning, module, *data = trainer
            if hasattr(lightning, "fit_loop"):
                return run_lightning(lightning, module, data, self)
        if hasattr(trainer, "callback_handler") and hasattr(trainer, "training_step"):
            return run_transformers(trainer, self)
        raise CalibrationError(
            "make_trainer returned no known trainer.",
            "Return a Trainer of transformers or TRL, or a tuple of Lightning's Trainer, module and"
            " data.",
        )

    def steps_of(self, max_steps: int | None) -> int:
        """Return the trainer's number of steps: its own if it sets one, else the trial's."""
        planned = self.trial._steps  # reading trial.steps would count as using it
        if max_steps is not None and max_steps < planned:
            raise CalibrationError(
                f"The trainer's max_steps is {max_steps}, less than the trial's {planned}.",
                "Lower steps=.",
            )
        return self.trial.steps if max_steps is None else max_steps

    def add(self, loss: torch.Tensor) -> None:
        """Add a batch's loss, divided by the number of batches per step."""
        self._loss = self._loss + loss.detach()

    def end_step(self, value: Any = None) -> bool:
        """Report the step's value, by default its loss. Return whether the run must end."""
        loss, self._loss = self._loss, 0.0
        self.steps_taken += 1
        return self.report(loss if value is None else value)

    def score(self, trainer: Any, evaluate: Callable[[], Mapping[str, Any]]) -> Any:
        """Return the score of a run that took all its steps, or None if there is none."""
        if self.metric is None or self.steps_taken < self.trial._steps:
            return None
        if callable(self.metric):
            return self.metric(trainer)
        metrics = evaluate()
        if self.metric not in metrics:
            raise CalibrationError(
                f"The evaluation has no {self.metric!r}.",
                f"It has {', '.join(sorted(metrics))}.",
            )
        return metrics[self.metric]


# --- transformers ---------------------------------------------------------------------------------


def run_transformers(trainer: Any, run: TrainerRun) -> Any:
    """Run a trial of a calibration by `trainer.train` and return its score, or None if there is
    none.
    """
    from transformers import TrainerCallback, set_seed

    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise CalibrationError(
            "The trainer that make_trainer returned already has an optimizer.",
            "Leave optimizers= and optimizer_cls_and_kwargs= out, since it gets the trial's"
            " optimizer.",
        )
    trainer.args = args = copy.copy(trainer.args)
    args.max_steps = run.steps_of(args.max_steps if args.max_steps > 0 else None)
    batches = args.gradient_accumulation_steps * args.world_size
    run.horizon["batch"] = args.train_batch_size * batches
    run.horizon["warmup"] = args.get_warmup_steps(args.max_steps) / args.max_steps
    args.seed = run.trial.seed % 2**32
    args.save_strategy = type(args.save_strategy)("no")
    args.load_best_model_at_end = args.push_to_hub = False

    def make(
        params: Any, *, lr: Any = None, **settings: Any
    ) -> Any:  # the rate is the trial's
        run.trial.lr = None  # under DeepSpeed it is made twice
        return run.trial.optimizer(params, **settings)

    factory = TrainerFactory(trainer, run.native, run.settings, make)
    trainer.optimizer_cls_and_kwargs = (factory, {})
    training_step = trainer.training_step

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        run.add(loss)
        return loss

    class Reports(TrainerCallback):
        """Reports every step, and stops the trainer when the trial ends."""

        def on_step_end(
            self, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> None:
            if run.end_step():
                control.should_training_stop = True

    if run.metric is None and hasattr(trainer, "reward_funcs"):
        run.horizon["by reward"] = True
        _report_rewards(trainer, run)
    else:
        trainer.training_step = watched_step
        trainer.add_callback(Reports())
    set_seed(args.seed)  # the trainer's constructor used the seed of its arguments
    trainer.train()
    return run.score(trainer, trainer.evaluate)


def _report_rewards(trainer: Any, run: TrainerRun) -> None:
    """Let a trainer report minus the reward that it logs after every step, and stop when the trial
    ends. Its other callbacks see the logs of the steps at which it would have logged.

    A step without new completions logs no reward, and has that of the step before.
    """
    args, handler = trainer.args, trainer.callback_handler
    every = args.logging_steps if args.logging_strategy == "steps" else math.inf
    if every < 1:  # a share of the steps
        every = math.ceil(every * args.max_steps)
    args.logging_strategy = type(args.logging_strategy)("steps")
    args.logging_steps = 1
    pass_on, reward = handler.on_log, None

    def on_log(args: Any, state: Any, control: Any, logs: Mapping[str, Any]) -> Any:
        nonlocal reward
        # logs of an evaluation, or of the whole run
        if state.global_step != run.steps_taken + 1:
            return pass_on(args, state, control, logs)
        reward = logs.get("reward", reward)
        if reward is None:
            raise CalibrationError(
                f"{type(trainer).__name__} logs no reward, and its loss is about zero by"
                " construction.",
                "Give score=, a function of the trained trainer, such as minus its mean reward.",
            )
        if run.end_step(-reward):
            control.should_training_stop = True
        if state.global_step % every == 0:
            return pass_on(args, state, control, logs)
        control.should_log = False
        return control

    handler.on_log = on_log


# --- Lightning ------------------------------------------------------------------------------------


def run_lightning(
    trainer: Any, module: Any, data: Sequence[Any], run: TrainerRun
) -> Any:
    """Run the trial by `trainer.fit` and return its score, or None if there is none."""
    kinds = type(module).__mro__
    base: Any = next((c for c in kinds if c.__name__ == "LightningModule"), None)
    if base is None:
        raise CalibrationError(
            f"make_trainer returned a {type(module).__name__} instead of Lightning's module.",
            "Return (trainer, module, loaders or datamodule).",
        )
    callbacks = import_module(f"{base.__module__.rpartition('.core')[0]}.callbacks")
    if type(module).configure_optimizers is base.configure_optimizers:
        module.configure_optimizers = lambda: run.trial.optimizer(
            module, **run.settings
        )
    elif run.settings:
        raise CalibrationError(
            f"settings= was given, but {type(module).__name__} configures its optimizer itself.",
            "Give them there: trial.optimizer(self, ...).",
        )
    loop = trainer.fit_loop
    limit = loop.epoch_loop.max_steps
    loop.epoch_loop.max_steps = run.steps_of(limit if limit >= 0 else None)
    loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None

    class Reports(callbacks.Callback):  # type: ignore[name-defined]
        """Reports every step, and stops the trainer when the trial ends."""

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, *args: Any
        ) -> None:
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
        metrics: dict[str, Any] = {}
        for of_loader in trainer.validate(module, *loaders, verbose=False):
            metrics |= of_loader
        return metrics

    no_checkpoints = [
        c for c in trainer.callbacks if not isinstance(c, callbacks.Checkpoint)
    ]
    trainer.callbacks = [*no_checkpoints, Reports()]
    with _interrupts_come_out():
        trainer.fit(module, *data)
        return run.score(trainer, validated)


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
