"""A trainer of transformers or TRL: its run, its optimizer, and a trial that it runs.

Importing this module imports neither library. Its functions do.
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
    """A `Trainer` of transformers, or a subclass such as those of TRL."""

    def __init__(self, trainer: External) -> None:
        self.trainer = trainer
        self.model = trainer.model
        self.source = type(trainer).train
        args = trainer.args
        batches = args.gradient_accumulation_steps * args.world_size
        self.batch = args.train_batch_size * batches
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
        loaders = getattr(self.trainer.accelerator, "_dataloaders", [])
        before = [*loaders]
        with torch.random.fork_rng(devices=[]):
            batches = len(self.trainer.get_train_dataloader())
        loaders[:] = before  # without the loader that was only counted
        each: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        return math.ceil(float(args.num_train_epochs) * each)

    def own_class(self) -> type[Optimizer] | None:
        with suppress(OptimizerError):
            return self._choice(None, {})[0]
        return None

    def own_rate(self) -> OwnRate | None:
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
        args = trainer.args
        nobody_tuned = args.learning_rate == type(args).learning_rate
        if nobody_tuned and not settings.keys() & {"lr", "recipe"}:
            refuse_without_rate()

        def build(params: External, **arguments: External) -> RankAwareOptimizer:
            opt = RankAwareOptimizer(params, native, **arguments)
            args.learning_rate = float(opt.defaults["lr"])
            return opt

        factory = OptimizerFactory(self, native, settings, build)
        with warnings.catch_warnings():
            # the same warnings come when the optimizer is built for training
            warnings.simplefilter("ignore", RankAwareWarning)
            report: Report = factory(trainer.model).report()
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            report = replace(report, unmoved=())  # they may train float32 copies
        trainer.optimizer_cls_and_kwargs = (factory, {})
        log_rates(trainer)
        return report

    def _choice(
        self, optimizer: type[Optimizer] | str | None, settings: Settings
    ) -> tuple[type[Optimizer], Settings]:
        """Return the class to wrap, and the settings that the trainer has for it. Without a class
        it is the one that the trainer would build.

        The learning rate of the arguments is left out, because it may be a default. That of
        `optimizer_cls_and_kwargs` is left out if there is a recipe, which has a rate of its own.
        """
        if optimizer is not None:
            return _class_named(optimizer), {}
        passed = self.trainer.optimizer_cls_and_kwargs
        native, defaults = passed or self.own_optimizer()
        if {"params", "model", "optimizer_dict"} & defaults.keys():
            raise OptimizerError(
                f"The trainer's own optimizer, optim={self.trainer.args.optim!r}, builds its"
                " parameter groups itself.",
                "Choose another class: attach(trainer, torch.optim.AdamW, ...).",
            )
        if passed is None or "recipe" in settings:
            defaults = {name: defaults[name] for name in defaults if name != "lr"}
        return get_optimizer_class(native), defaults

    def own_optimizer(self) -> tuple[type, Settings]:
        """Return the optimizer class that the trainer's arguments name, and its settings."""
        trainer = self.trainer
        native, settings = trainer.get_optimizer_cls_and_kwargs(
            trainer.args, trainer.model
        )
        return native, settings

    def trained(self, model: nn.Module) -> nn.Module:
        """Return the module whose parameters train. model: the model, maybe wrapped."""
        return model

    def groups(self, module: nn.Module) -> Groups:
        """Return Trainer's two parameter groups of a module. The second one has the norms and
        biases, without weight decay.

        There are two groups even if one is empty, because the lists of a checkpoint are matched by
        them.
        """
        with_decay = {*self.trainer.get_decay_parameter_names(module)}
        groups: Groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for name, param in module.named_parameters():
            if param.requires_grad:
                groups[name not in with_decay]["params"].append(param)
        return groups

    # --- a trial ----------------------------------------------------------------------------------

    def touched(self) -> Touched:
        trainer = self.trainer
        accelerator = trainer.accelerator
        processing = getattr(trainer, "processing_class", None)
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

        # below 1 it is a share of the steps already
        if args.warmup_steps and args.warmup_steps >= 1:
            args.warmup_steps = scaled(args.warmup_steps)
        settings = dict(args.lr_scheduler_kwargs or {})  # such as num_decay_steps
        for name, value in settings.items():
            if name.startswith("num_") and name.endswith("_steps") and value:
                settings[name] = scaled(value)
        args.lr_scheduler_kwargs = settings
        return self

    def train(self, run: TrialRun) -> object:
        """Run a trial by `trainer.train`. Nothing evaluates, saves or logs it but our callback."""
        from transformers import set_seed

        trainer = self.trainer
        refuse_second_optimizer(trainer, run.native)
        trainer.args = args = copy.copy(trainer.args)
        args.max_steps = run.trial.steps
        args.seed = run.trial.seed % 2**32
        args.eval_on_start = args.logging_nan_inf_filter = False
        trainer.log_completions = False  # of TRL

        # The learning rate is the trial's. Under DeepSpeed the optimizer is built twice.
        def build(
            params: External, *, lr: object = None, **settings: object
        ) -> RankAwareOptimizer:
            return run.trial.optimizer(params, **settings)

        factory = OptimizerFactory(self, run.native, run.settings, build)
        trainer.optimizer_cls_and_kwargs = (factory, {})
        by_reward = self.task == "rl" and run.score is None
        trainer.callback_handler = copy.copy(trainer.callback_handler)
        trainer.callback_handler.callbacks = [_reports(trainer, run, by_reward)]
        trainer.control = copy.copy(trainer.control)
        is_scored = by_reward or run.score is not None
        parts = [] if is_scored else _hold_out(trainer)
        set_seed(args.seed)  # the trainer's constructor used the seed of its arguments
        trainer.train()
        return run.result(trainer, lambda: _loss_on(trainer, parts))


def refuse_second_optimizer(trainer: External, optimizer: object) -> None:
    """Raise an `OptimizerError` if a trainer has built its optimizer, or if it was built with a
    class and is given another one.
    """
    kind, _ = trainer.optimizer_cls_and_kwargs or (None, {})
    is_attached = isinstance(kind, OptimizerFactory)
    if is_attached or trainer.optimizer is not None or (kind and optimizer):
        raise OptimizerError(
            "The trainer already has an optimizer: attach was called on it before, or it was"
            " trained, or it was built with one.",
            "Build it again without optimizers= and optimizer_cls_and_kwargs=. Then calibrate,"
            " attach once, and train. In a function of a trial, remove attach, and return a new"
            " trainer each time.",
        )


def refuse_without_rate() -> None:
    """Raise the `OptimizerError` of `attach` without a learning rate."""
    raise OptimizerError(
        "attach was called without a learning rate.",
        "Pass lr= with tuned_at=, or recipe=. Or set learning_rate in the trainer's arguments to"
        " another value than its default, which nobody tuned. ra.suggest_lr(trainer) suggests a"
        " first learning rate.",
    )


def _class_named(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """Return the class of an optimizer. A value of `optim=` of TrainingArguments is not its name,
    and the error says so.
    """
    try:
        return get_optimizer_class(optimizer)
    except OptimizerError as error:
        raise OptimizerError(
            error.cause,
            f"{error.cure} If it is a value of TrainingArguments(optim=...), set it there, and call"
            " attach without an optimizer.",
        ) from error


# --- a trial's values and score -------------------------------------------------------------------


def _reports(trainer: External, run: TrialRun, by_reward: bool) -> External:
    """Return the callback that reports the loss of every step, or minus its reward, to the trial.
    It stops the trainer when the trial ends.
    """
    from transformers import TrainerCallback

    class Reports(TrainerCallback):
        reward: float | None = None  # a step without new completions keeps it

        def on_step_end(
            self, args: External, state: External, control: External, **_: object
        ) -> None:
            control.should_log = True

        def on_log(
            self,
            args: External,
            state: External,
            control: External,
            logs: External = None,
            **_: object,
        ) -> None:
            # Trainer also logs the whole run and each evaluation after it, at the same step.
            if state.global_step == run.steps_taken:
                return
            value = logs.get("loss")
            if by_reward:
                self.reward = logs.get("reward", self.reward)
                value = None if self.reward is None else -self.reward
            if value is None:
                raise CalibrationError(
                    f"{type(trainer).__name__} logs no reward, and its loss is about zero at any"
                    " learning rate.",
                    "Pass score=, a function of the trained trainer.",
                )
            control.should_training_stop = run.end_step(value)

    return Reports()


def _hold_out(trainer: External) -> list[External]:
    """Return data sets for a trainer's score, of at most `BATCHES` batches together: parts of its
    `eval_dataset`. Without one they are taken out of its training data. The list is empty if that
    has too few rows.
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
    if isinstance(trainer.train_dataset, Mapping):
        kind: External = type(trainer.train_dataset)
        trainer.train_dataset = kind(rest)
    elif rest:
        (trainer.train_dataset,) = rest.values()
    return parts


def _by_name(data: External) -> Mapping[str, External]:
    """Return data sets by name: the one without a name, or all those of a dict."""
    if data is None:
        return {}
    return data if isinstance(data, Mapping) else {"": data}


@torch.no_grad()
def _loss_on(trainer: External, parts: Iterable[External]) -> float | None:
    """Return the mean loss over the batches of data sets, None if there are none."""
    model = trainer.model
    losses = []
    model.eval()
    if hasattr(trainer.optimizer, "eval"):  # for schedule-free optimizers
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
    """Builds an optimizer at the settings of a trainer's arguments.

    Trainer calls a factory without arguments, and then the result with the wrapped model and
    settings. axolotl's trainer also passes its arguments. Older versions of transformers, and
    Unsloth on a CPU with a learning rate for embeddings, pass groups in place of the model.

    Args:
        owner: the trainer.
        native: the class that is wrapped.
        given: the user's settings. If they have neither a learning rate nor a recipe, the rate is
            that of the trainer's arguments at each call.
        build: `build(params, model=..., **settings)` builds the optimizer. It is called twice under
            DeepSpeed.
        written: the learning rate of the arguments when an optimizer was last built. If a search or
            the user has written another rate into them since, that rate trains.
        module: the module whose parameters train. The optimizer refers to it weakly, so the factory
            keeps it.
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
        """Return this factory if there are no parameters, else an optimizer for a model or for
        groups.
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
                # a group at the trainer's base rate gets ours
                if group.get("lr") == args.learning_rate:
                    del group["lr"]
        _keep_embeddings_in_32_bits(self.module, self.native, settings)
        build = partial(self.build, model=self.module, **settings)
        if trainer.is_deepspeed_enabled:
            # ZeRO flattens every group, so each part is a group of its own
            parts = build([dict(group) for group in groups]).rates.groups
            groups = [{**groups[p.user_group], "params": list(p.params)} for p in parts]
        opt = build(groups)
        self.written = args.learning_rate
        return opt

    def _settings(self, args: External) -> Settings:
        """Return the user's settings, completed by those of the arguments."""
        settings = {**_of_arguments(self.native, args), **self.given}
        is_written = self.written not in (None, args.learning_rate)
        if "recipe" not in settings:
            return settings | ({"lr": args.learning_rate} if is_written else {})
        if is_written:
            raise OptimizerError(
                f"learning_rate={args.learning_rate:g} was written into the trainer's arguments,"
                " as by a search, after attach was called with a recipe, which has its own learning"
                " rate.",
                "Remove learning_rate from the search, or call attach with lr= and tuned_at=.",
            )
        del settings["lr"]
        return settings


def _of_arguments(native: type[Optimizer], args: External) -> Settings:
    """Return the settings of `args` that `native` accepts.

    The learning rate and the weight decay are always among them, as Trainer passes them. Betas and
    epsilon are if they were set, and if the class takes them in this form: Adafactor's eps is a
    pair, for example.
    """
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
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _keep_embeddings_in_32_bits(
    model: nn.Module, native: type[Optimizer], settings: Settings
) -> None:
    """Let an 8-bit optimizer of bitsandbytes keep the state of embeddings in 32 bits, as Trainer
    and PEFT do.
    """
    if not native.__module__.startswith("bitsandbytes"):
        return
    if settings.get("optim_bits") == 8 or "8bit" in native.__name__:
        optim: External = import_module("bitsandbytes.optim")
        manager = optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
