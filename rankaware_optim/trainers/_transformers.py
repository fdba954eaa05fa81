"""What a trainer of transformers or TRL is: its optimizer, a trial that it runs, and a trainer that
is built already.

Importing this module imports none of them. Its functions do.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import ConcatDataset

from .. import calibration
from .._optimizers import get_optimizer_class
from ..errors import CalibrationError, OptimizerError
from ..optimizer import RankAwareOptimizer
from ._trial import BATCHES, FILE, Snapshot, TrainerRuns, divided, held_out


def is_trainer(value: Any) -> bool:
    """Return whether a value is a trainer of transformers or TRL."""
    return hasattr(value, "callback_handler") and hasattr(value, "training_step")


def check_trainer(trainer: Any, optimizer: object) -> None:
    """Raise an `OptimizerError` if it is no trainer, or has made its optimizer, or was given
    another one than this class.
    """
    if not is_trainer(trainer):
        raise OptimizerError(
            f"attach got a {type(trainer).__name__}, which is not a Trainer of transformers.",
            "Give a trainer of transformers or TRL, or Lightning's (trainer, module).",
        )
    kind, _ = trainer.optimizer_cls_and_kwargs or (None, {})
    is_attached = isinstance(kind, TrainerFactory)
    if is_attached or trainer.optimizer is not None or (kind and optimizer):
        raise OptimizerError(
            "The trainer already has an optimizer: attach was called on it before, or it was"
            " trained, or was given one.",
            "Build it again without optimizers= and optimizer_cls_and_kwargs=. Calibrate, attach"
            " once, and then train. In a function of a trial leave attach out, and return a new"
            " trainer each time.",
        )


def class_named(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """Return an optimizer's class. An `optim=` of TrainingArguments is no name of one."""
    try:
        return get_optimizer_class(optimizer)
    except OptimizerError as error:
        raise OptimizerError(
            error.cause,
            f"{error.cure} If it is a trainer's optim=, set it there, and leave the class out.",
        ) from error


# --- a trial --------------------------------------------------------------------------------------


def run_trainer(trainer: Any, run: TrainerRuns) -> Any:
    """Run a trial of a calibration by `trainer.train` and return its score, or None if there is
    none.

    Only its own callback sees the run, which nothing evaluates, saves or logs elsewhere.
    """
    from transformers import TrainerCallback, set_seed

    check_trainer(trainer, run.native)
    trainer.args = args = copy.copy(trainer.args)
    args.max_steps = steps = run.trial.steps
    args.seed = run.trial.seed % 2**32
    args.eval_on_start = args.logging_nan_inf_filter = False
    trainer.log_completions = False  # of TRL
    warmup = args.get_warmup_steps(steps)
    calibration.refuse_warmup(warmup, steps)
    run.warmup = warmup / steps
    batches = args.gradient_accumulation_steps * args.world_size
    run.batch = args.train_batch_size * batches
    run.by_reward = is_by_reward(trainer, run.score)

    # under DeepSpeed it is made twice; the rate is the trial's
    def make(params: Any, *, lr: Any = None, **settings: Any) -> Any:
        return run.trial.optimizer(params, **settings)

    factory = TrainerFactory(trainer, run.native, run.settings, make)
    trainer.optimizer_cls_and_kwargs = (factory, {})

    class Reports(TrainerCallback):
        """Reports the loss or minus the reward of every step, and stops the trainer when the trial
        ends. A step without new completions has the reward of the step before.
        """

        reward: float | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = True

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
        ) -> None:
            # not the log of the whole run, or of an evaluation after it
            if state.global_step == run.steps_taken:
                return
            value = logs.get("loss")
            if run.by_reward:
                self.reward = logs.get("reward", self.reward)
                value = None if self.reward is None else -self.reward
            if value is None:
                raise CalibrationError(
                    f"{type(trainer).__name__} logs no reward, and its loss is about zero by"
                    " construction.",
                    "Give score=, a function of the trained trainer.",
                )
            control.should_training_stop = run.end_step(value)

    trainer.callback_handler = copy.copy(trainer.callback_handler)
    trainer.callback_handler.callbacks = [Reports()]
    trainer.control = copy.copy(trainer.control)
    is_scored = run.by_reward or run.score is not None
    part = None if is_scored else _hold_out(trainer)
    set_seed(args.seed)  # the trainer's constructor used the seed of its arguments
    trainer.train()
    return run.result(trainer, lambda: _held_out_loss(trainer, part))


def is_by_reward(trainer: Any, score: object) -> bool:
    """Return whether a trainer's values are the rewards that it logs."""
    return score is None and hasattr(trainer, "reward_funcs")


def _hold_out(trainer: Any) -> Any:
    """Return a data set for a trainer's score, of at most `BATCHES` batches: a part of its
    `eval_dataset`. Where it has none, it is taken out of its training data, None if there are too
    few.
    """
    args = trainer.args
    given = trainer.eval_dataset
    rows = BATCHES * args.eval_batch_size * args.world_size
    if isinstance(given, Mapping):
        given = ConcatDataset(given.values())
    if given is not None:
        return divided(given, rows)[0]
    data = trainer.train_dataset
    parts = None if data is None else held_out(data, rows)
    if parts is None:
        return None
    part, trainer.train_dataset = parts
    return part


@torch.no_grad()
def _held_out_loss(trainer: Any, part: Any) -> float | None:
    """Return the mean loss over the batches of a data set, None if there is none."""
    if part is None:
        return None
    model = trainer.model
    losses = []
    model.eval()
    if hasattr(trainer.optimizer, "eval"):  # for schedule-free optimizers
        trainer.optimizer.eval()
    for batch in trainer.get_eval_dataloader(part):
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            losses.append(trainer.compute_loss(model, inputs).float().mean())
    return float(torch.stack(losses).mean())


# --- a trainer that is built ----------------------------------------------------------------------


class BuiltTrainer:
    """A trainer of transformers or TRL that is not trained yet. A trial is a run of the trainer
    itself.
    """

    def __init__(self, trainer: Any, by_reward: bool) -> None:
        self.trainer = self.subject = trainer
        self.source = type(trainer).train
        self.is_by_reward = by_reward
        self.file: Path | None = Path(trainer.args.output_dir, FILE)
        self.model = trainer.model

    def snapshot(self) -> Snapshot:
        """Return the state to which every trial's is put back."""
        trainer = self.trainer
        accelerator = self.trainer.accelerator
        objects = [trainer, accelerator, accelerator.gradient_state, accelerator.scaler]
        data = [trainer.train_dataset, trainer.eval_dataset, trainer.data_collator]
        return Snapshot([trainer.model], objects, data)

    def steps(self) -> int:
        """Return the steps of the run, as the trainer counts them."""
        args = self.trainer.args
        if args.max_steps > 0:
            return int(args.max_steps)
        batches = len(self.trainer.get_train_dataloader())
        each: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        return math.ceil(float(args.num_train_epochs) * each)

    def run(self, trial: calibration.Trial, whole: int) -> Any:
        """Return the trainer for a trial, whose arguments' counts of steps have its share of the
        run. whole: the steps of the run.
        """
        args = self.trainer.args = copy.copy(self.trainer.args)

        def scaled(count: float) -> int:
            return max(1, round(count * trial.steps / whole))

        if args.warmup_steps and args.warmup_steps >= 1:
            args.warmup_steps = scaled(args.warmup_steps)
        settings = dict(args.lr_scheduler_kwargs or {})  # such as num_decay_steps
        for name, value in settings.items():
            if name.startswith("num_") and name.endswith("_steps") and value:
                settings[name] = scaled(value)
        args.lr_scheduler_kwargs = settings
        return self.trainer


# --- its optimizer --------------------------------------------------------------------------------


@dataclass(repr=False)
class TrainerFactory:
    """Makes an optimizer at the settings of a trainer's arguments.

    Trainer calls a factory without arguments, and then its result with the wrapped model. Older
    versions, and Unsloth on a CPU with a rate for embeddings, pass groups.

    Args:
        trainer: the trainer.
        native: the class that is wrapped.
        given: the user's settings. Without a rate or a recipe, the rate is that of the arguments at
            each call. With a rate too, once a search or the user has written another into them.
        make: `make(params, model=..., **settings)` builds the optimizer. It is called twice under
            DeepSpeed.
        written: the rate of the arguments when an optimizer was last made.
    """

    trainer: Any
    native: type[Optimizer]
    given: Mapping[str, Any]
    make: Callable[..., RankAwareOptimizer]
    written: float | None = None

    def __call__(self, params: Any = None, **_: Any) -> Any:
        """Return this factory if there are no parameters, else an optimizer for a model or for
        groups.
        """
        if params is None:
            return self
        trainer = self.trainer
        args = self.trainer.args
        settings = self._settings(args)
        if isinstance(params, nn.Module):
            model = params
            groups = _groups(trainer, params)
        else:
            model = trainer.model
            groups = [dict(group) for group in params]
            for group in groups:
                # a group at the trainer's base rate gets ours
                if group.get("lr") == args.learning_rate:
                    del group["lr"]
        _keep_embeddings_in_32_bits(model, self.native, settings)
        make = partial(self.make, model=model, **settings)
        if trainer.is_deepspeed_enabled:
            # ZeRO flattens every group, so each part is a group of its own
            parts = make([dict(group) for group in groups]).rates.groups
            groups = [{**groups[p.user_group], "params": list(p.params)} for p in parts]
        opt = make(groups)
        self.written = args.learning_rate
        return opt

    def _settings(self, args: Any) -> dict[str, Any]:
        """Return the user's settings, completed by those of the arguments."""
        settings = {**_of_arguments(self.native, args), **self.given}
        is_written = self.written not in (None, args.learning_rate)
        if "recipe" not in settings:
            return settings | ({"lr": args.learning_rate} if is_written else {})
        if is_written:
            raise OptimizerError(
                f"learning_rate={args.learning_rate:g} was written into the trainer's arguments,"
                " as by a search, after attach was given a recipe, whose rate it is not.",
                "Leave learning_rate out of the search, or attach with lr= and tuned_at=.",
            )
        del settings["lr"]
        return settings


def _of_arguments(native: type[Optimizer], args: Any) -> dict[str, Any]:
    """Return the settings of `args` that `native` accepts: the rate and the weight decay, which
    Trainer always passes, and betas and eps if they were set, in the form that the class has.
    Adafactor's eps are two, for example.
    """
    usual = _of_adam(type(args))
    values: Any = {"weight_decay": args.weight_decay, **_of_adam(args)}
    settings = {"lr": args.learning_rate}
    for name, accepted in inspect.signature(native).parameters.items():
        value = values.get(name)
        is_set = value != usual.get(name)
        if is_set and np.shape(accepted.default) == np.shape(value):
            settings[name] = value
    return settings


def _of_adam(args: Any) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _groups(trainer: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Return Trainer's two groups, the second of norms and biases without weight decay.

    A decay of 0, or a model without norms and biases, gives two groups too, since a checkpoint's
    lists are matched by them.
    """
    with_decay = {*trainer.get_decay_parameter_names(model)}
    groups: list[Any] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups[name not in with_decay]["params"].append(param)
    return groups


def _keep_embeddings_in_32_bits(
    model: nn.Module, native: type[Optimizer], settings: Mapping[str, Any]
) -> None:
    """Let an 8-bit optimizer of bitsandbytes keep the state of embeddings in 32 bits, as Trainer
    and PEFT do.
    """
    if not native.__module__.startswith("bitsandbytes"):
        return
    if settings.get("optim_bits") == 8 or "8bit" in native.__name__:
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
