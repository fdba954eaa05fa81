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

from .._optimizers import get_optimizer_class
from ..errors import OptimizerError, RankAwareWarning
from ..optimizer import RankAwareOptimizer, Report
from ..recipe import Recipe
from . import _lightning, _transformers
from ._logs import inside, log_rates
from ._transformers import TrainerFactory


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
    if "recipe" in settings:
        settings |= _of_recipe(settings)
    if _lightning.is_pair(trainer):
        return _attach_module(trainer[1], optimizer or "adamw", settings)
    _transformers.check_trainer(trainer, optimizer)
    if optimizer is None:
        native, defaults = _trainers_choice(trainer, settings)
        settings = {**defaults, **settings}
    else:
        native = _transformers.class_named(optimizer)
    saved = trainer.args
    if "learning_rate" not in _transformers.changed_arguments(saved):
        _refuse_without_rate(settings)

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


def _of_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings' recipe, and the method that it is for unless one is given."""
    recipe = settings["recipe"]
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if recipe.reference.method == "full" and "method" not in settings:
        return {"recipe": recipe, "method": "full"}
    return {"recipe": recipe}


def _attach_module(
    module: Any, optimizer: type[Optimizer] | str, settings: dict[str, Any]
) -> Report:
    _lightning.refuse_with_optimizer(module)
    _refuse_without_rate(settings)
    if "recipe" in settings:
        settings = {**settings["recipe"].settings, **settings}

    def make() -> RankAwareOptimizer:
        return RankAwareOptimizer(module, optimizer, **settings)

    opt = make()
    if _lightning.has_own(module, "configure_optimizers"):
        _lightning.set_rate(module, float(opt.defaults["lr"]))
    else:
        module.configure_optimizers = make
    return opt.report()


def _refuse_without_rate(settings: Mapping[str, Any]) -> None:
    if not settings.keys() & {"lr", "recipe"}:
        raise OptimizerError(
            "attach was given no rate.",
            "Give lr= with tuned_at=, recipe=, or set learning_rate in a trainer's arguments to"
            " another value than its default, which nobody tuned. ra.suggest_lr(trainer) says a"
            " first one.",
        )


def _trainers_choice(
    trainer: Any, settings: Mapping[str, Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class that the trainer would build, and its settings. A rate of the arguments is
    left out, since it may be a default. A recipe's rate replaces one that is there.
    """
    given = trainer.optimizer_cls_and_kwargs
    native, defaults = given or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, trainer.model
    )
    makes_groups = {"params", "model", "optimizer_dict"} & defaults.keys()
    if makes_groups or not isinstance(native, type):
        raise OptimizerError(
            f"The trainer's own optimizer, {getattr(trainer.args, 'optim', native)}, makes its"
            " groups itself.",
            "Give another class: attach(trainer, torch.optim.AdamW, ...).",
        )
    if given is None or "recipe" in settings:
        defaults = {name: value for name, value in defaults.items() if name != "lr"}
    return get_optimizer_class(native), defaults


def _keeps_float32(trainer: Any) -> bool:
    """Return whether weights of fewer bits will be float32 when they train: DeepSpeed's are, and
    those that accelerate shards for mixed precision.
    """
    is_mixed = trainer.accelerator.mixed_precision != "no"
    return bool(trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and is_mixed))


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
            wrapper = kwargs["optimizer"]
            opt = inside(wrapper)
            if not isinstance(opt, RankAwareOptimizer):
                raise OptimizerError(
                    f"The trainer has made its own {type(opt).__name__} and would not train with"
                    " the attached optimizer.",
                    _OF_ITS_OWN,
                )
            if wrapper is not opt:
                wrapper.report, wrapper.rates = opt.report, opt.rates

    return Look()
