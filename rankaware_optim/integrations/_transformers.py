"""What a trainer of transformers or TRL is: its optimizer, a trial that it runs, and a trainer that
is built already.

Importing this module imports none of them. Its functions do.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import calibration
from .._optimizers import get_optimizer_class
from ..errors import CalibrationError, OptimizerError
from ..optimizer import RankAwareOptimizer
from ._run import BATCHES, PART, TrainerRuns, divided, is_sized
from ._snapshot import Snapshot, cannot_be_put_back

if TYPE_CHECKING:
    from ..calibration import Trial


def is_trainer(value: Any) -> bool:
    """Return whether a value is a trainer of transformers or TRL."""
    return hasattr(value, "callback_handler") and hasattr(value, "training_step")


_ATTACH_ONCE = (
    "Build it again without optimizers= and optimizer_cls_and_kwargs=. Calibrate, attach once, and"
    " then train."
)


def check_trainer(trainer: Any, optimizer: object, cure: str = _ATTACH_ONCE) -> None:
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
            cure,
        )


def class_named(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """Return an optimizer's class. An `optim=` of TrainingArguments is no name of one."""
    try:
        return get_optimizer_class(optimizer)
    except OptimizerError as error:
        from transformers.training_args import OptimizerNames

        if optimizer not in {each.value for each in OptimizerNames}:
            raise
        raise OptimizerError(
            f"{optimizer!r} is a trainer's name for an optimizer, not a class.",
            f"Set optim={optimizer!r} in the trainer's arguments, and leave the class out.",
        ) from error


# --- a trial --------------------------------------------------------------------------------------


def run_trainer(trainer: Any, run: TrainerRuns) -> Any:
    """Run a trial of a calibration by `trainer.train` and return its score, or None if there is
    none.
    """
    from transformers import TrainerCallback, set_seed

    check_trainer(
        trainer,
        run.native,
        "A trial attaches its own optimizer: leave attach out of the function, and return a new"
        " trainer each time.",
    )
    trainer.args = args = copy.copy(trainer.args)
    args.max_steps = steps = run.trial.steps
    args.seed = run.trial.seed % 2**32
    args.save_strategy = type(args.save_strategy)("no")
    args.load_best_model_at_end = args.push_to_hub = False
    warmup = args.get_warmup_steps(steps)
    calibration.refuse_warmup(warmup, steps)
    run.warmup = warmup / steps
    batches = args.gradient_accumulation_steps * args.world_size
    run.batch = args.train_batch_size * batches
    run.by_reward = is_by_reward(trainer, run.score)
    if run.by_reward:
        args.logging_strategy = type(args.logging_strategy)("steps")
        args.logging_steps = 1

    def make(params: Any, *, lr: Any = None, **settings: Any) -> Any:
        run.trial.lr = None  # the rate is the trial's; under DeepSpeed it is made twice
        return run.trial.optimizer(params, **settings)

    factory = TrainerFactory(trainer, run.native, run.settings, make)
    trainer.optimizer_cls_and_kwargs = (factory, {})
    training_step = trainer.training_step

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        run.add(loss)
        return loss

    class Reports(TrainerCallback):
        """Reports the loss or minus the reward of every step, and stops the trainer when the trial
        ends. A step without new completions has the reward of the step before.
        """

        reward: float | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not run.by_reward and run.end_step():
                control.should_training_stop = True

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
        ) -> None:
            # not the logs of an evaluation, or of the whole run
            if not run.by_reward or state.global_step != run.steps_taken + 1:
                return
            self.reward = logs.get("reward", self.reward)
            if self.reward is None:
                raise CalibrationError(
                    f"{type(trainer).__name__} logs no reward, and its loss is about zero by"
                    " construction.",
                    "Give score=, a function of the trained trainer.",
                )
            if run.end_step(-self.reward):
                control.should_training_stop = True

    trainer.add_callback(Reports())
    trainer.training_step = watched_step
    is_scored = run.by_reward or run.score is not None
    parts = [] if is_scored else hold_out(trainer)
    set_seed(args.seed)  # the trainer's constructor used the seed of its arguments
    trainer.train()
    return run.result(trainer, lambda: _held_out_loss(trainer, parts))


def is_by_reward(trainer: Any, score: object) -> bool:
    """Return whether a trainer's values are the rewards that it logs."""
    return score is None and hasattr(trainer, "reward_funcs")


def hold_out(trainer: Any) -> list[Any]:
    """Return data sets for a trainer's score, of at most `BATCHES` batches: parts of its
    `eval_dataset`. Where it has none, they are taken out of its training data, [] if there are too
    few.
    """
    args, given = trainer.args, trainer.eval_dataset
    rows = BATCHES * args.eval_batch_size * args.world_size
    if given is not None:
        several = _several(given)
        return [divided(each, rows // len(several))[0] for each in several]
    data = trainer.train_dataset
    if is_sized(data):
        rows = min(rows, len(data) // PART)
    if data is None or not rows:
        return []
    part, trainer.train_dataset = divided(data, rows)
    return [part]


def _several(data: Any) -> list[Any]:
    return [*data.values()] if isinstance(data, Mapping) else [data]


@torch.no_grad()
def _held_out_loss(trainer: Any, parts: list[Any]) -> float | None:
    """Return the mean loss over the batches of some data sets, None if there are none."""
    model, losses = trainer.model, []
    model.eval()
    if callable(getattr(trainer.optimizer, "eval", None)):  # schedule-free optimizers
        trainer.optimizer.eval()
    for part in parts:
        for batch in trainer.get_eval_dataloader(part):
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                losses.append(trainer.compute_loss(model, inputs).float().mean())
    return float(torch.stack(losses).mean()) if losses else None


# --- a trainer that is built ----------------------------------------------------------------------


class BuiltTrainer:
    """A trainer of transformers or TRL that is not trained yet.

    A trial is a run of the trainer itself with arguments and callbacks of its own, and leaves no
    trace in what sees the real run: trackers, checkpoints, early stopping, the hub.
    """

    def __init__(self, trainer: Any, by_reward: bool) -> None:
        self.trainer = self.subject = trainer
        self.source = type(trainer).train
        self.is_by_reward, self.is_evaluated = by_reward, not by_reward
        self.folder: Path | None = Path(trainer.args.output_dir)
        self.model = trainer.model

    def snapshot(self) -> Snapshot:
        """Return the state to which every trial's is put back."""
        trainer = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise cannot_be_put_back("FSDP or DeepSpeed shards it")
        models = [trainer.model, trainer.model_wrapped]
        models.append(getattr(trainer, "ref_model", None))  # of TRL
        accelerator = trainer.accelerator
        objects = [trainer, accelerator, accelerator.gradient_state, accelerator.scaler]
        data = [trainer.train_dataset, *_several(trainer.eval_dataset)]
        models = [model for model in models if isinstance(model, nn.Module)]
        return Snapshot(models, objects, [*data, trainer.data_collator])

    def steps(self) -> int:
        """Return the steps of the run, as the trainer counts them."""
        args = self.trainer.args
        if args.max_steps > 0:
            return int(args.max_steps)
        batches = len(self.trainer.get_train_dataloader())
        each: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        return math.ceil(float(args.num_train_epochs) * each)

    def run(self, trial: Trial, whole: int) -> Any:
        """Return the trainer, as it runs a trial. whole: the steps of the run."""
        from transformers import TrainerControl, TrainerState
        from transformers.trainer_callback import DefaultFlowCallback

        trainer = self.trainer
        trainer.args = _arguments(trainer.args, trial.steps / whole)
        trainer.callback_handler = copy.copy(trainer.callback_handler)
        trainer.callback_handler.callbacks = [DefaultFlowCallback()]
        trainer.state, trainer.control = TrainerState(), TrainerControl()
        return trainer


def _arguments(args: Any, share: float) -> Any:
    """Return a copy of a trainer's arguments for a trial: counts of steps at its share of the run,
    and no evaluation or log.
    """
    args = copy.copy(args)
    if args.warmup_steps and args.warmup_steps >= 1:
        args.warmup_steps = _scaled(args.warmup_steps, share)
    settings = dict(args.lr_scheduler_kwargs or {})  # such as num_decay_steps
    for name, value in settings.items():
        if name.startswith("num_") and name.endswith("_steps") and value is not None:
            settings[name] = _scaled(value, share)
    args.lr_scheduler_kwargs = settings
    for name in ("eval_strategy", "logging_strategy"):
        setattr(args, name, type(getattr(args, name))("no"))
    args.eval_on_start = args.log_completions = False
    args.report_to, args.disable_tqdm = [], True
    return args


def _scaled(count: float, share: float) -> int:
    return max(1, round(count * share))


# --- its optimizer --------------------------------------------------------------------------------


class TrainerFactory:
    """Makes an optimizer at the settings of a trainer's arguments.

    Trainer calls a factory without arguments, and then its result with the wrapped model. Older
    versions, and Unsloth on a CPU with a rate for embeddings, pass groups.

    Args:
        trainer: the trainer.
        native: the class that is wrapped.
        settings: the user's. Without a rate or a recipe, the rate is that of the arguments at each
            call. With a rate too, once a search or the user has written another into them.
        make: `make(params, model=..., **settings)` builds the optimizer. It is called twice under
            DeepSpeed.
    """

    def __init__(
        self,
        trainer: Any,
        native: type[Optimizer],
        settings: Mapping[str, Any],
        make: Callable[..., RankAwareOptimizer],
    ) -> None:
        self._trainer, self._native = trainer, native
        self._given, self._make = settings, make
        # the rate of the arguments when an optimizer was last made
        self._written: float | None = None

    def __call__(self, params: Any = None, **_: Any) -> Any:
        """Return this factory if there are no parameters, else an optimizer for a model or for
        groups.
        """
        if params is None:
            return self
        trainer, args = self._trainer, self._trainer.args
        settings = self._settings(args)
        if isinstance(params, nn.Module):
            model, groups = params, _groups(params)
        else:
            model, groups = trainer.model, [dict(group) for group in params]
            for group in groups:
                # a group at the trainer's base rate gets ours
                if group.get("lr") == args.learning_rate:
                    del group["lr"]
        _keep_embeddings_in_32_bits(model, self._native, settings)
        make = partial(self._make, model=model, **settings)
        if trainer.is_deepspeed_enabled:
            # ZeRO flattens every group, so each part is a group of its own
            parts = make([dict(group) for group in groups]).rates.groups
            groups = [{**groups[p.user_group], "params": list(p.params)} for p in parts]
        opt = make(groups)
        self._written = args.learning_rate
        return opt

    def _settings(self, args: Any) -> dict[str, Any]:
        """Return the user's settings, completed by those of the arguments."""
        settings = {**_of_arguments(self._native, args), **self._given}
        is_written = self._written not in (None, args.learning_rate)
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
    accepted = inspect.signature(native).parameters
    defaults = {name: each.default for name, each in accepted.items()}
    changed = changed_arguments(args)
    settings = {"lr": args.learning_rate}
    if "weight_decay" in accepted:
        settings["weight_decay"] = args.weight_decay
    betas = defaults.get("betas")
    has_two = isinstance(betas, tuple) and len(betas) == 2
    if has_two and {"adam_beta1", "adam_beta2"} & changed:
        settings["betas"] = (args.adam_beta1, args.adam_beta2)
    if "adam_epsilon" in changed and isinstance(defaults.get("eps"), float):
        settings["eps"] = args.adam_epsilon
    return settings


def changed_arguments(args: Any) -> set[str]:
    """Return the names of the arguments that differ from their defaults."""
    return {f.name for f in fields(args) if getattr(args, f.name) != f.default}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return Trainer's two groups, the second of norms and biases without weight decay.

    A decay of 0, or a model without norms and biases, gives two groups too, since a checkpoint's
    lists are matched by them.
    """
    from transformers import Trainer

    # a method that does not use `self`
    names_of: Any = Trainer.get_decay_parameter_names
    with_decay = set(names_of(None, model))
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (decayed if name in with_decay else spared).append(param)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


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
