"""`attach`: an optimizer for a trainer of transformers or TRL, or Lightning's module, that is built
already.

Importing this module imports none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from .._checks import plain_lr
from .._optimizers import get_optimizer_class
from .._warn import warn
from ..errors import OptimizerError, RankAwareWarning
from ..optimizer import RankAwareOptimizer, Report
from ..recipe import Recipe
from ._lightning_run import configures, is_pair, set_rate
from ._logs import log_rates
from ._trainer_factory import TrainerFactory, changed_arguments


def attach(
    trainer: Any, optimizer: type[Optimizer] | str | None = None, **settings: Any
) -> Report:
    """Let a trainer train with a `RankAwareOptimizer`, and return the report of its rates. Call it
    before training::

        trainer = GRPOTrainer(model, rewards, args=args, train_dataset=data)
        tuned = {"lr": 2e-4, "tuned_at": "r=16,alpha=32"}
        print(ra.attach(trainer, torch.optim.AdamW, **tuned))
        trainer.train()

    The optimizer is made again when the trainer has wrapped its model. Weight decay, and rate,
    betas and epsilon if they were set, come from the trainer's arguments unless they are given
    here. Norms and biases get no weight decay, as in Trainer. The rates that it trains at are
    logged. While it trains, `trainer.optimizer` has `report` and `rates`, in accelerate's wrapper
    too. The base rate is written into the arguments, which are saved with the run.

    Of Lightning give `(trainer, module)`, as to `calibrate`. If the module configures its optimizer
    at `self.lr` or `self.learning_rate`, this is set, and its schedule is its own. If it configures
    none, it gets one at a constant rate, with the settings of the recipe.

    Args:
        trainer: transformers' `Trainer` or a subclass, or a tuple of Lightning's trainer, the
            module, and anything else.
        optimizer: a torch optimizer class, or its name. By default the one that the trainer would
            make, or AdamW of a module. If it was given `optimizer_cls_and_kwargs`, that class with
            those settings, the rate included.
        **settings: the arguments of `RankAwareOptimizer` and the optimizer's own. A rate or
            `recipe` is required.

    Raises:
        OptimizerError: it is not such a trainer, it has an optimizer already, or no rate was given.
            As with every error of `RankAwareOptimizer`, nothing was changed. `train` raises it
            before the first step if the trainer has made another optimizer.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    recipe = settings.get("recipe")
    if isinstance(recipe, Recipe) and recipe.reference.method == "full":
        settings.setdefault("method", "full")
    if is_pair(trainer):
        return _attach_module(trainer[1], optimizer or "adamw", settings)
    _check_trainer(trainer, optimizer)
    if optimizer is None:
        native, defaults = _trainers_choice(trainer, settings)
        settings = {**defaults, **settings}
    else:
        native = get_optimizer_class(optimizer)
    _check_settings(trainer, settings)
    saved = trainer.args

    def make(params: Any, **arguments: Any) -> RankAwareOptimizer:
        opt = RankAwareOptimizer(params, native, **arguments)
        saved.learning_rate = float(opt.defaults["lr"])
        return opt

    factory = TrainerFactory(trainer, native, settings, make)
    with warnings.catch_warnings():
        # its warnings come when it is made for training
        warnings.simplefilter("ignore", RankAwareWarning)
        report: Report = factory(trainer.model).report()
    if _keeps_float32(trainer):
        report = replace(report, unmoved=())
    trainer.optimizer_cls_and_kwargs = (factory, {})
    log_rates(trainer)
    trainer.add_callback(_look())
    return report


def _attach_module(
    module: Any, optimizer: type[Optimizer] | str, settings: dict[str, Any]
) -> Report:
    native = get_optimizer_class(optimizer)
    _refuse_model(settings)
    if not settings.keys() & {"lr", "recipe"}:
        raise OptimizerError(
            "attach was given no rate.", "Give lr= with tuned_at=, or recipe=."
        )
    if "configure_optimizers" in vars(module):
        raise OptimizerError(
            "The module already has an optimizer: attach was called on it before.",
            "Build it again, and attach once.",
        )
    recipe = settings.get("recipe")
    if recipe is not None:
        known = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        settings = {**known.settings, **settings}
    opt = RankAwareOptimizer(module, native, **settings)
    if not configures(module):
        module.configure_optimizers = lambda: RankAwareOptimizer(
            module, native, **settings
        )
        return opt.report()
    set_rate(module, float(opt.defaults["lr"]))
    return opt.report()


def _check_trainer(trainer: Any, optimizer: object) -> None:
    if not hasattr(trainer, "callback_handler") or not hasattr(
        trainer, "optimizer_cls_and_kwargs"
    ):
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
            "Build it again without optimizers= and optimizer_cls_and_kwargs=, and attach once,"
            " before training.",
        )


def _trainers_choice(
    trainer: Any, settings: Mapping[str, Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class that the trainer would build, and its settings. A rate of the arguments is
    left out, since it may be a default. A recipe's rate replaces one that is there.
    """
    native, defaults = (
        trainer.optimizer_cls_and_kwargs
        or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    )
    if {"params", "model", "optimizer_dict"} & defaults.keys() or not isinstance(
        native, type
    ):
        raise OptimizerError(
            f"The trainer's own optimizer, {getattr(trainer.args, 'optim', native)}, makes its"
            " groups itself.",
            "Give another class: attach(trainer, torch.optim.AdamW, ...).",
        )
    if trainer.optimizer_cls_and_kwargs is None or "recipe" in settings:
        defaults = {name: value for name, value in defaults.items() if name != "lr"}
    return get_optimizer_class(native), defaults


def _refuse_model(settings: Mapping[str, Any]) -> None:
    if "model" in settings:
        raise OptimizerError(
            "attach was given model=, but uses that of the trainer.", "Leave it out."
        )


def _check_settings(trainer: Any, settings: Mapping[str, Any]) -> None:
    """Raise if no rate was given, or a model, which the trainer gives. A default rate of the
    arguments is not tuned. Warn if a rate replaces one that was set there.
    """
    args, lr = trainer.args, settings.get("lr")
    _refuse_model(settings)
    is_set = "learning_rate" in changed_arguments(args)
    # an own class of the trainer has its own rate
    counts = is_set and trainer.optimizer_cls_and_kwargs is None
    if counts and lr is not None and plain_lr(lr) != args.learning_rate:
        warn(
            f"attach's lr={float(lr):g} replaces learning_rate={args.learning_rate:g} of the"
            " arguments."
        )
    if is_set or settings.keys() & {"lr", "recipe"}:
        return
    raise OptimizerError(
        "attach was given no rate.",
        "Give lr= with tuned_at=, recipe=, or set learning_rate in the arguments to another value"
        f" than its default, {args.learning_rate:g}, which nobody tuned. ra.suggest_lr(trainer)"
        " says a first one.",
    )


def _keeps_float32(trainer: Any) -> bool:
    """Return whether weights of fewer bits will be float32 when they train: DeepSpeed's are, and
    those that accelerate shards for mixed precision.
    """
    if getattr(trainer, "is_deepspeed_enabled", False):
        return True
    is_sharded = getattr(trainer, "is_fsdp_enabled", False)
    return is_sharded and trainer.accelerator.mixed_precision != "no"


_OF_ITS_OWN = (
    "Take out what makes it: create_optimizer of a subclass, the optimizer in DeepSpeed's"
    " configuration, or Unsloth's embedding_learning_rate, in whose place attach takes"
    " rates={'*modules_to_save*': ...}. Or build RankAwareOptimizer there and leave attach out."
)


def _look() -> Any:
    """Return a callback that looks into the wrapper around the trainer's optimizer at the start."""
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        """Gives the wrapper `report` and `rates`. Raises if the trainer made its own optimizer."""

        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            wrapper = opt = kwargs["optimizer"]
            while not isinstance(opt, RankAwareOptimizer):
                if getattr(opt, "optimizer", None) is None:
                    raise OptimizerError(
                        f"The trainer has made its own {type(opt).__name__} and would not train"
                        " with the attached optimizer.",
                        _OF_ITS_OWN,
                    )
                opt = opt.optimizer
            if wrapper is not opt:
                wrapper.report, wrapper.rates = opt.report, opt.rates

    return Look()
