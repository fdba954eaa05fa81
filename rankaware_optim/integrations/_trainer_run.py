"""A trial that a trainer of transformers, TRL or Lightning runs.

The trainer runs in the caller's thread. A callback reports each step's loss and stops it. Importing
this module imports none of these packages.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ..calibration import Trial, refuse_warmup
from ..errors import CalibrationError
from ._held_out import held_out_loss, hold_out
from ._lightning_run import is_pair, run_pair
from ._trainer_factory import TrainerFactory

BY_REWARD = (
    "a run's value is minus the reward that its trainer logged, and not its loss"
)


def is_trainer(value: Any) -> bool:
    """Return whether a value is a trainer of transformers or TRL."""
    return hasattr(value, "callback_handler") and hasattr(value, "training_step")


def is_by_reward(trainer: Any, score: object) -> bool:
    """Return whether a trainer's values are the rewards that it logs."""
    return score is None and hasattr(trainer, "reward_funcs")


# --- a trial --------------------------------------------------------------------------------------


@dataclass
class TrainerRun:
    """The trial, the optimizer's class and settings, the score, and the loss of the current step.

    metric: the name of an evaluation metric, a function of the trainer, or None for the loss on
    data held out. report: gets a step's value and returns whether the run must end. horizon: is
    given the batch and the warm-up's share of the arguments, and whether the values are rewards.
    built: whether the trainer was built before the calibration.
    """

    trial: Trial
    native: type[Optimizer]
    settings: Mapping[str, Any]
    metric: str | Callable[[Any], Any] | None
    report: Callable[[Any], bool]
    horizon: dict[str, Any]
    built: bool = False
    steps_taken: int = 0
    like: Any = None  # the optimizer at whose rates a module's own one trains
    _loss: Any = field(default=0.0, repr=False)

    def by(self, trainer: Any) -> Any:
        """Run the trial by a trainer and return its score, or None if there is none."""
        if is_pair(trainer):
            lightning, module, *data = trainer
            return run_pair(lightning, module, data, self)
        return run_trainer(trainer, self)

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

    def score(
        self,
        trainer: Any,
        evaluate: Callable[[], Mapping[str, Any]],
        loss: Callable[[], Any],
    ) -> Any:
        """Return the score of a run that took all its steps, or None if there is none.

        Args:
            trainer: the trainer.
            evaluate: returns its metrics.
            loss: returns the loss on data held out, or None.
        """
        if self.steps_taken < self.trial._steps:
            return None
        if self.metric is None:
            return loss()
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


def run_trainer(trainer: Any, run: TrainerRun) -> Any:
    """Run a trial of a calibration by `trainer.train` and return its score, or None if there is
    none.
    """
    from transformers import TrainerCallback, set_seed

    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise CalibrationError(
            "The trainer already has an optimizer.",
            "Leave optimizers= and optimizer_cls_and_kwargs= out, since it gets the trial's"
            " optimizer; attach afterwards.",
        )
    trainer.args = args = copy.copy(trainer.args)
    args.max_steps = run.steps_of(args.max_steps if args.max_steps > 0 else None)
    batches = args.gradient_accumulation_steps * args.world_size
    run.horizon["batch"] = args.train_batch_size * batches
    warmup = args.get_warmup_steps(args.max_steps)
    refuse_warmup(warmup, run.trial._steps)
    run.horizon["warmup"] = warmup / args.max_steps
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

    parts = []
    if is_by_reward(trainer, run.metric):
        run.horizon["by reward"] = True
        _report_rewards(trainer, run)
    else:
        parts = hold_out(trainer) if run.metric is None else []
        trainer.training_step = watched_step
        trainer.add_callback(Reports())
    set_seed(args.seed)  # the trainer's constructor used the seed of its arguments
    trainer.train()
    return run.score(trainer, trainer.evaluate, lambda: held_out_loss(trainer, parts))


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
