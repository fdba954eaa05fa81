"""This module attaches an optimizer to a trainer of transformers or TRL, and runs the
trials of a calibration with such a trainer.

Importing this module does not import transformers or TRL.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from .._optimizers import get_optimizer_class
from ..errors import CalibrationError, OptimizerError, RankAwareWarning
from ..optimizer import RankAwareOptimizer, Report
from ._data import divided, held_out
from ._logs import log_rates
from ._trainer import (
    BATCHES,
    External,
    OwnRate,
    Settings,
    Touched,
    Trainer,
    TrialRun,
)

Groups = list[Settings]


class TransformersTrainer(Trainer):
    """A `Trainer` of transformers, or a trainer of TRL, which is a subclass of
    `Trainer`.
    """

    def __init__(self, trainer: External) -> None:
        self.trainer = trainer
        self.model = trainer.model
        self.source = type(trainer).train
        args = trainer.args
        batches = args.gradient_accumulation_steps * args.world_size
        self.batch = args.train_batch_size * batches
        # TRL may not be installed, so its trainers are recognized by name or attribute.
        names = {kind.__name__ for kind in type(trainer).__mro__}
        if hasattr(trainer, "reward_funcs"):
            self.task = "rl"
        elif "DPOTrainer" in names:
            self.task = "dpo"

    @staticmethod
    def is_one(value: object) -> bool:
        return hasattr(value, "callback_handler") and hasattr(value, "training_step")

    def steps(self) -> int:
        args = self.trainer.args
        if args.max_steps > 0:
            return int(args.max_steps)
        # Only the length of the loader is needed. But accelerate stores every loader that it
        # prepares, and a sampler draws its seed from torch's generator. Both are undone, so
        # that training starts from the same state.
        loaders = getattr(self.trainer.accelerator, "_dataloaders", [])
        before = [*loaders]
        with torch.random.fork_rng(devices=[]):
            batches = len(self.trainer.get_train_dataloader())
        loaders[:] = before
        # Trainer also makes a step after the last batch of an epoch
        each: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        return math.ceil(float(args.num_train_epochs) * each)

    def own_class(self) -> type[Optimizer] | None:
        with suppress(OptimizerError):
            return self._choice(None, {})[0]
        return None

    def own_rate(self) -> OwnRate | None:
        # the user may have passed optimizer_cls_and_kwargs, whose lr wins over the arguments
        passed = self.trainer.optimizer_cls_and_kwargs
        if passed is not None and "lr" in passed[1]:
            return OwnRate("lr", float(passed[1]["lr"]))
        args = self.trainer.args
        is_default = args.learning_rate == type(args).learning_rate
        return OwnRate("learning_rate", float(args.learning_rate), is_default)

    def warmup(self, steps: int) -> float:
        return float(self.trainer.args.get_warmup_steps(steps))

    # --- a real run -------------------------------------------------------------------------------

    def attach(
        self, optimizer: type[Optimizer] | str | None, settings: Settings
    ) -> Report:
        trainer = self.trainer
        refuse_second_optimizer(trainer, optimizer)
        native, of_trainer = self._choice(optimizer, settings)
        settings = {**of_trainer, **settings}
        # The default of TrainingArguments is 5e-5 for any model and method. It is not
        # scaled to other ranks, because nobody has tuned it.
        args = trainer.args
        nobody_tuned = args.learning_rate == type(args).learning_rate
        if nobody_tuned and not settings.keys() & {"lr", "recipe"}:
            raise OptimizerError(
                "attach() was called without a learning rate, and learning_rate in the trainer's"
                " arguments is only the default, which nobody has tuned for your model.",
                "Pass lr= together with tuned_at=, or pass recipe=. To get a first learning rate,"
                " call ra.suggest_lr(trainer).",
            )

        def build(params: External, **arguments: External) -> RankAwareOptimizer:
            opt = RankAwareOptimizer(params, native, **arguments)
            # Trainer saves and logs its arguments, so they must contain the learning rate.
            args.learning_rate = float(opt.defaults["lr"])
            return opt

        # Trainer builds its optimizer inside train(). Build one here too, for the report and so
        # that errors come before training.
        factory = OptimizerFactory(self, native, settings, build)
        with warnings.catch_warnings():
            # the same warnings appear again when the optimizer is built for training
            warnings.simplefilter("ignore", RankAwareWarning)
            report: Report = factory(trainer.model).report()
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            # Both may train float32 copies of the weights, so the report must not warn that
            # updates are too small to change bfloat16 weights.
            report = replace(report, unmoved=())
        trainer.optimizer_cls_and_kwargs = (factory, {})
        log_rates(trainer)
        return report

    def _choice(
        self, optimizer: type[Optimizer] | str | None, settings: Settings
    ) -> tuple[type[Optimizer], Settings]:
        """Return the optimizer class that `RankAwareOptimizer` wraps, and the trainer's
        settings for this class.

        If the user passes no optimizer class, the method returns the optimizer class
        that the trainer would build. The learning rate in the trainer's arguments is
        left out of the returned settings, because this learning rate may be a default.
        If the user passes a recipe, the learning rate in `optimizer_cls_and_kwargs` is
        also left out, because a recipe already contains a learning rate.
        """
        if optimizer is not None:
            return _class_named(optimizer), {}
        passed = self.trainer.optimizer_cls_and_kwargs
        native, defaults = passed or self.own_optimizer()
        # For GaLore, LOMO and layer-wise optimizers, Trainer passes parameters or the model
        # among the settings. They would replace the groups of this package.
        if {"params", "model", "optimizer_dict"} & defaults.keys():
            raise OptimizerError(
                f"The optimizer optim={self.trainer.args.optim!r} in the trainer's arguments cannot"
                " be wrapped, because it builds its parameter groups itself.",
                "Choose another optimizer, for example attach(trainer, torch.optim.AdamW, ...).",
            )
        if passed is None or "recipe" in settings:
            defaults = {name: defaults[name] for name in defaults if name != "lr"}
        return get_optimizer_class(native), defaults

    def own_optimizer(self) -> tuple[type, Settings]:
        """Return the optimizer class that the trainer's arguments select, and the
        settings of this class.
        """
        trainer = self.trainer
        native, settings = trainer.get_optimizer_cls_and_kwargs(
            trainer.args, trainer.model
        )
        return native, settings

    def trained(self, model: nn.Module) -> nn.Module:
        """Return the torch module whose parameters are trained.

        Args:
            model: the model, which a framework such as FSDP may have wrapped.
        """
        return model

    def groups(self, module: nn.Module) -> Groups:
        """Return the two parameter groups that the optimizer of `Trainer` would have.

        The second parameter group contains the norms and biases, which have no weight
        decay. The method returns two groups even if one of them is empty, because an
        optimizer can only load a checkpoint with the same number of parameter groups.
        """
        with_decay = {*self.trainer.get_decay_parameter_names(module)}
        groups: Groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for name, param in module.named_parameters():
            if param.requires_grad:
                # False is index 0, and True is index 1
                groups[name not in with_decay]["params"].append(param)
        return groups

    # --- a trial ----------------------------------------------------------------------------------

    def touched(self) -> Touched:
        trainer = self.trainer
        accelerator = trainer.accelerator
        processing = getattr(trainer, "processing_class", None)
        # train() changes attributes of all of these: accelerate counts accumulated batches
        # in gradient_state, the scaler adapts its factor, and a tokenizer its padding.
        return Touched(
            [trainer.model],
            [trainer, accelerator, accelerator.gradient_state, accelerator.scaler],
            [
                trainer.train_dataset,
                trainer.eval_dataset,
                trainer.data_collator,
                processing,
            ],
        )

    def for_trial(self, steps: int, whole: int) -> Trainer:
        args = self.trainer.args = copy.copy(self.trainer.args)

        def scaled(count: float) -> int:
            return max(1, round(count * steps / whole))

        # newer versions of transformers read a number below 1 as a fraction of all steps
        if args.warmup_steps and args.warmup_steps >= 1:
            args.warmup_steps = scaled(args.warmup_steps)
        # schedulers such as warmup-stable-decay have numbers of steps, as in num_decay_steps
        settings = dict(args.lr_scheduler_kwargs or {})
        for name, value in settings.items():
            if name.startswith("num_") and name.endswith("_steps") and value:
                settings[name] = scaled(value)
        args.lr_scheduler_kwargs = settings
        return self

    def train(self, run: TrialRun) -> object:
        """Run a trial of a calibration with `trainer.train`, without evaluation,
        checkpoints and logging.
        """
        from transformers import set_seed

        trainer = self.trainer
        refuse_second_optimizer(trainer, run.native)
        trainer.args = args = copy.copy(trainer.args)
        args.max_steps = run.trial.steps
        # NumPy's seeds have 32 bits
        args.seed = run.trial.seed % 2**32
        # Trainer would otherwise replace a NaN loss in its logs by the last finite loss, so
        # that a diverged trial would look good.
        args.eval_on_start = args.logging_nan_inf_filter = False
        trainer.log_completions = False  # of TRL

        # The argument lr is ignored, because the trial has the learning rate.
        def build(
            params: External, *, lr: object = None, **settings: object
        ) -> RankAwareOptimizer:
            return run.trial.optimizer(params, **settings)

        factory = OptimizerFactory(self, run.native, run.settings, build)
        trainer.optimizer_cls_and_kwargs = (factory, {})
        by_reward = self.task == "rl" and run.score is None
        # The user's callbacks are left out: they may save, log or stop. Trainer's callbacks
        # that evaluate and save are in the same list.
        trainer.callback_handler = copy.copy(trainer.callback_handler)
        trainer.callback_handler.callbacks = [_reports(trainer, run, by_reward)]
        trainer.control = copy.copy(trainer.control)
        is_scored = by_reward or run.score is not None
        parts = [] if is_scored else _hold_out(trainer)
        # Trainer sets the seed in its constructor, which ran before this trial's seed was
        # known.
        set_seed(args.seed)
        trainer.train()
        return run.result(trainer, lambda: _loss_on(trainer, parts))


def refuse_second_optimizer(trainer: External, optimizer: object) -> None:
    """Raise an `OptimizerError` if a trainer already has an optimizer.

    An `OptimizerError` is also raised if the user passes an optimizer class, but the
    trainer was built with `optimizer_cls_and_kwargs`.
    """
    kind, _ = trainer.optimizer_cls_and_kwargs or (None, {})
    if isinstance(kind, OptimizerFactory):
        raise OptimizerError(
            "The trainer already has an optimizer, because attach() or calibrate() has used this"
            " trainer before.",
            "Build a new trainer. If it is built by a function that you pass to calibrate(), build"
            " a new trainer in every call, and do not call attach() in this function.",
        )
    if trainer.optimizer is not None:
        raise OptimizerError(
            "The trainer already has an optimizer, because train() or create_optimizer() was called"
            " before, or because the trainer was built with optimizers=.",
            "Build a new trainer without optimizers=. If a function builds the trainer for each"
            " trial, build a new trainer in every call.",
        )
    if kind and optimizer:
        raise OptimizerError(
            "The trainer already has an optimizer class, because it was built with"
            " optimizer_cls_and_kwargs=.",
            "Build a new trainer without optimizer_cls_and_kwargs=.",
        )


def _class_named(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """Return the optimizer class with a given name. If a class is passed instead of a
    name, return this class.

    Users often pass a value of `TrainingArguments(optim=...)`, such as "adamw_torch",
    which is not the name of a class. For such a name, the error explains that it must
    be set in the trainer's arguments.
    """
    try:
        return get_optimizer_class(optimizer)
    except OptimizerError:
        from transformers.training_args import OptimizerNames

        if optimizer not in [name.value for name in OptimizerNames]:
            raise
        raise OptimizerError(
            f"{optimizer!r} is a value of TrainingArguments(optim=...), but not the name of a torch"
            " optimizer class.",
            f"Set optim={optimizer!r} in the trainer's arguments, and call attach() without an"
            " optimizer.",
        ) from None


# --- a trial's values and score -------------------------------------------------------------------


def _reports(trainer: External, run: TrialRun, by_reward: bool) -> External:
    """Return a callback that reports the loss or the reward of every step to the trial.

    The callback reports the loss of the step, or minus the reward if `by_reward` is
    true. The callback stops the trainer when the trial ends.
    """
    from transformers import TrainerCallback

    class Reports(TrainerCallback):
        # A step that trains again on old completions logs no reward, so the last reward is
        # reported again.
        reward: float | None = None

        def on_step_end(
            self, args: External, state: External, control: External, **_: object
        ) -> None:
            # log at every step, whatever logging_steps is, because a trial needs every loss
            control.should_log = True

        def on_log(
            self,
            args: External,
            state: External,
            control: External,
            logs: External = None,
            **_: object,
        ) -> None:
            # Trainer calls on_log again at the last step, for the summary of the run and for
            # evaluations. Each step is reported only once.
            if state.global_step == run.steps_taken:
                return
            value = logs.get("loss")
            if by_reward:
                self.reward = logs.get("reward", self.reward)
                value = None if self.reward is None else -self.reward
            if value is None:
                kind = type(trainer).__name__
                raise CalibrationError(
                    f"The trainer, a {kind}, logs no reward, so its trials cannot be compared. Its"
                    " loss is about zero at any learning rate.",
                    "Pass score= with a function that takes the trained trainer and returns a"
                    " number to minimise.",
                )
            control.should_training_stop = run.end_step(value)

    return Reports()


def _hold_out(trainer: External) -> list[External]:
    """Return the held-out data sets on which a trial is scored.

    Together, these held-out data sets have at most `BATCHES` batches. The held-out rows
    come from the trainer's `eval_dataset`. If the trainer has no `eval_dataset`, the
    function removes rows from the training data and returns these rows. If the training
    data has too few rows, no data is held out and the returned list is empty.
    """
    args = trainer.args
    rows = BATCHES * args.eval_batch_size * args.world_size
    if trainer.eval_dataset is not None:
        given = _by_name(trainer.eval_dataset)
        return [divided(data, rows // len(given))[0] for data in given.values()]
    given = _by_name(trainer.train_dataset)
    parts, rest = [], {}
    for name, data in given.items():
        divided_in_two = held_out(data, rows // len(given))
        if divided_in_two is None:
            return []
        part, rest[name] = divided_in_two
        parts.append(part)
    # sentence-transformers has a dict of data sets, with a class such as DatasetDict
    if isinstance(trainer.train_dataset, Mapping):
        kind: External = type(trainer.train_dataset)
        trainer.train_dataset = kind(rest)
    elif rest:
        (trainer.train_dataset,) = rest.values()
    return parts


def _by_name(data: External) -> Mapping[str, External]:
    """Return a dict from names to data sets. If a data set has no name, its key is
    "".
    """
    if data is None:
        return {}
    return data if isinstance(data, Mapping) else {"": data}


@torch.no_grad()
def _loss_on(trainer: External, parts: Iterable[External]) -> float | None:
    """Return the mean loss on some data sets, or None if the list of data sets is empty."""
    # trainer.evaluate() would call the user's metrics, log, and generate with some trainers
    model = trainer.model
    losses = []
    model.eval()
    # The weights that a schedule-free optimizer trains are not the averaged weights that
    # should be evaluated. optimizer.eval() writes the averaged weights into the model.
    if hasattr(trainer.optimizer, "eval"):
        trainer.optimizer.eval()
    for part in parts:
        for batch in trainer.get_eval_dataloader(part):
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                losses.append(trainer.compute_loss(model, inputs).float().mean())
    return float(torch.stack(losses).mean()) if losses else None


# --- its optimizer --------------------------------------------------------------------------------


@dataclass(repr=False)
class OptimizerFactory:
    """A callable object that builds the optimizer of a transformers trainer.

    `Trainer` calls the optimizer factory in `optimizer_cls_and_kwargs` without
    arguments, and then calls the result with the wrapped model and the optimizer
    settings. The trainer of axolotl also passes its training arguments to the optimizer
    factory. Older versions of transformers pass parameter groups to the optimizer
    factory instead of the model. On a CPU, Unsloth also passes parameter groups if it
    trains embeddings at a different learning rate.

    Args:
        owner: the trainer.
        native: the optimizer class to wrap.
        given: the user's settings. If they contain neither a learning rate nor a recipe,
            the factory reads the learning rate from the trainer's arguments in each call.
        build: `build(params, model=..., **settings)` builds the optimizer. With DeepSpeed
            the factory calls it twice.
        written: the learning rate in the trainer's arguments when the last optimizer was
            built. If a search or the user has changed the arguments since then, the
            optimizer trains at the new learning rate.
        module: the module with the trained parameters. The optimizer has only a weak
            reference to it, so the factory stores it.
    """

    owner: TransformersTrainer
    native: type[Optimizer]
    given: Settings
    build: Callable[..., RankAwareOptimizer]
    written: float | None = None
    module: nn.Module | None = field(default=None, init=False)

    @property
    def trainer(self) -> External:
        return self.owner.trainer

    def __call__(self, params: External = None, *_: object, **__: object) -> External:
        """Return an optimizer for a model or for parameter groups.

        If this optimizer factory is called without arguments, return the factory
        itself.
        """
        if params is None:
            return self
        trainer = self.trainer
        args = trainer.args
        settings = self._settings(args)
        if isinstance(params, nn.Module):
            self.module = self.owner.trained(params)
            groups = self.owner.groups(self.module)
        else:
            self.module = self.owner.trained(trainer.model)
            groups = [dict(group) for group in params]
            for group in groups:
                # Trainer wrote its base learning rate into this group. Without it, the group
                # gets the base learning rate of the new optimizer. A group with any other
                # learning rate was set by the user and stays.
                if group.get("lr") == args.learning_rate:
                    del group["lr"]
        _keep_embeddings_in_32_bits(self.module, self.native, settings)
        build = partial(self.build, model=self.module, **settings)
        if trainer.is_deepspeed_enabled:
            # ZeRO joins all parameters of a group into one flat tensor, so parameters with
            # different learning rates must be in different groups. The first optimizer is
            # built only to find these groups.
            parts = build([dict(group) for group in groups]).rates.groups
            groups = [{**groups[p.user_group], "params": list(p.params)} for p in parts]
        opt = build(groups)
        self.written = args.learning_rate
        return opt

    def _settings(self, args: External) -> Settings:
        """Return the user's optimizer settings together with optimizer settings from
        the trainer's arguments.

        If the user has passed a setting that the trainer's arguments also contain, the
        user's value is used.

        Raises:
            OptimizerError: a recipe was passed, but a search has set a learning rate too.
        """
        # Trainer.hyperparameter_search writes each trial's learning rate into the arguments.
        settings = {**_of_arguments(self.native, args), **self.given}
        is_written = self.written not in (None, args.learning_rate)
        if "recipe" not in settings:
            return settings | ({"lr": args.learning_rate} if is_written else {})
        if is_written:
            raise OptimizerError(
                "The learning rate is set twice. First attach() was called with a recipe, which"
                f" contains a learning rate. Then learning_rate={args.learning_rate:g} was set in"
                " the trainer's arguments, for example by a hyperparameter search.",
                "Do not change learning_rate after attach(). To search for a learning rate, call"
                " attach() with lr= and tuned_at= instead of recipe=.",
            )
        del settings["lr"]
        return settings


def _of_arguments(native: type[Optimizer], args: External) -> Settings:
    """Return the optimizer settings in `args` that the class `native` accepts.

    The returned settings always contain the learning rate and, if the class accepts it,
    the weight decay. Betas and epsilon are included only if the user changed their
    defaults. The optimizer class must also expect values of the same shape. For
    example, Adafactor expects a pair for eps, so a single number is not passed to
    Adafactor.
    """
    # the defaults of the arguments' class, with which a changed value is recognized
    usual = _of_adam(type(args))
    values: Settings = {"weight_decay": args.weight_decay, **_of_adam(args)}
    settings = {"lr": args.learning_rate}
    for name, accepted in inspect.signature(native).parameters.items():
        value: External = values.get(name)
        is_set = value != usual.get(name)
        if is_set and np.shape(accepted.default) == np.shape(value):
            settings[name] = value
    return settings


def _of_adam(args: External) -> Settings:
    """Return Adam's betas and epsilon from training arguments, or the defaults of these
    values from the class of the arguments.
    """
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _keep_embeddings_in_32_bits(
    model: nn.Module, native: type[Optimizer], settings: Settings
) -> None:
    """Make 8-bit optimizers of bitsandbytes store the optimizer state of embeddings in
    32 bits.

    `Trainer` and PEFT also store the optimizer state of embeddings in 32 bits.
    """
    if not native.__module__.startswith("bitsandbytes"):
        return
    # The gradients of embeddings are sparse and uneven, so that 8 bits make training
    # unstable. bitsandbytes reads these overrides when it creates the state.
    if settings.get("optim_bits") == 8 or "8bit" in native.__name__:
        optim: External = import_module("bitsandbytes.optim")
        manager = optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
