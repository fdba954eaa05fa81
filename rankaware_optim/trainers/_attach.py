"""`attach`: an optimizer for a trainer of transformers or TRL, or Lightning's module, that is built
already. And every group's rates in the logs of a run.

Importing this module imports none of them. Its functions do.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch.optim import Optimizer

from .._near_misses import explain_near_misses
from .._optimizers import get_optimizer_class
from ..errors import OptimizerError, RankAwareWarning
from ..optimizer import RankAwareOptimizer, Report
from ..recipe import Recipe
from . import _lightning, _transformers
from ._transformers import TrainerFactory


@explain_near_misses
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
        settings = _with_recipe(settings)
    if _lightning.is_pair(trainer):
        return _attach_module(trainer, optimizer or "adamw", settings)
    _transformers.check_trainer(trainer, optimizer)
    if optimizer is None:
        native, defaults = _trainers_choice(trainer, settings)
        settings = {**defaults, **settings}
    else:
        native = _transformers.class_named(optimizer)
    saved = trainer.args
    if saved.learning_rate == type(saved).learning_rate:  # the default
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
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        report = replace(report, unmoved=())  # they may train float32 copies
    trainer.optimizer_cls_and_kwargs = (factory, {})
    log_rates(trainer)
    return report


def _with_recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose recipe is read, with its method unless they have one."""
    recipe = settings["recipe"]
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    return {"method": recipe.reference.method, **settings, "recipe": recipe}


def _attach_module(
    pair: Any, optimizer: type[Optimizer] | str, settings: dict[str, Any]
) -> Report:
    _refuse_without_rate(settings)
    trainer, module, *_ = pair
    if "recipe" in settings:
        settings = {**settings["recipe"].settings, **settings}

    def make() -> RankAwareOptimizer:
        return RankAwareOptimizer(module, optimizer, **settings)

    opt = make()
    if _lightning.has_own(module, "configure_optimizers"):
        _lightning.set_rate(trainer, module, float(opt.defaults["lr"]))
    else:
        module.configure_optimizers = make
    return opt.report()


def _refuse_without_rate(settings: dict[str, Any]) -> None:
    if not settings.keys() & {"lr", "recipe"}:
        raise OptimizerError(
            "attach was given no rate.",
            "Give lr= with tuned_at=, recipe=, or set learning_rate in a trainer's arguments to"
            " another value than its default, which nobody tuned. ra.suggest_lr(trainer) says a"
            " first one.",
        )


def _trainers_choice(
    trainer: Any, settings: dict[str, Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class that the trainer would build, and its settings. A rate of the arguments is
    left out, since it may be a default. A recipe's rate replaces one that is there.
    """
    given = trainer.optimizer_cls_and_kwargs
    native, defaults = given or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, trainer.model
    )
    makes_groups = {"params", "model", "optimizer_dict"} & defaults.keys()
    if makes_groups:
        raise OptimizerError(
            f"The trainer's own optimizer, {trainer.args.optim}, makes its groups itself.",
            "Give another class: attach(trainer, torch.optim.AdamW, ...).",
        )
    if given is None or "recipe" in settings:
        defaults = {name: value for name, value in defaults.items() if name != "lr"}
    return get_optimizer_class(native), defaults


# --- rates in logs --------------------------------------------------------------------------------


def group_rates(opt: Any) -> dict[str, float]:
    """Return the rates at which an optimizer trains, each once: "lr/r8" for both factors of a rank,
    and "lr/B/r8" where B's differs, and "lr/other".

    Args:
        opt: a `RankAwareOptimizer`, in a framework's wrapper or not. Another optimizer has none.
    """
    ours = _inside(opt)
    initial: dict[str, float] = {}
    rates: dict[str, float] = {}
    for group in ours.rates.groups if isinstance(ours, RankAwareOptimizer) else []:
        if not group.names:  # as Trainer's second one, where no norm trains
            continue
        name = group.role if group.rank is None else f"r{group.rank}"
        # by where they start, so that a warm-up from zero has the same names
        if initial.setdefault(name, group.initial_lr) != group.initial_lr:
            name = f"{group.role}/{name}"
        rates[f"lr/{name}"] = group.lr
    return rates


def _inside(opt: Any) -> Any:
    """Return the `RankAwareOptimizer` in a framework's wrappers, or what is innermost."""
    while not isinstance(opt, RankAwareOptimizer) and hasattr(opt, "optimizer"):
        opt = opt.optimizer
    return opt


_OF_ITS_OWN = (
    "Take out what makes it: create_optimizer of a subclass, the optimizer in DeepSpeed's"
    " configuration, or Unsloth's embedding_learning_rate, in whose place attach takes"
    " rates={'*modules_to_save*': ...}. Or build RankAwareOptimizer there and leave attach out."
)


def log_rates(trainer: Any) -> None:
    """Let transformers' `Trainer` log the rates that it trains at, beside the base rate, which it
    logs as `learning_rate`. `attach` calls this function.

    Args:
        trainer: the trainer. Its reporters, such as TensorBoard's, get the rates too. `train`
            raises an `OptimizerError` if its optimizer is no `RankAwareOptimizer`.
    """
    if not hasattr(trainer, "callback_handler"):
        raise OptimizerError(
            f"log_rates got a {type(trainer).__name__}, which is not a Trainer of transformers.",
            "Pass the trainer: log_rates(trainer). For Lightning use lightning_rates().",
        )
    from transformers import TrainerCallback

    class LogRates(TrainerCallback):
        """Gives a wrapper around the optimizer `report` and `rates`, and adds the rates of the last
        step to the training logs, as Trainer does for group 0.
        """

        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            wrapper = kwargs["optimizer"]
            opt = _inside(wrapper)
            if not isinstance(opt, RankAwareOptimizer):
                raise OptimizerError(
                    f"The trainer has made its own {type(opt).__name__} and would not train with"
                    " the attached optimizer.",
                    _OF_ITS_OWN,
                )
            if wrapper is not opt:
                wrapper.report, wrapper.rates = opt.report, opt.rates

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            self.rates = group_rates(kwargs["optimizer"])

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
        ) -> None:
            if "learning_rate" in logs:
                for entry in (logs, *state.log_history[-1:]):
                    entry.update(self.rates)

    # Trainer calls its reporters before the callbacks that it is given
    trainer.callback_handler.callbacks.insert(0, LogRates())


def lightning_rates() -> Any:
    """Return a callback for Lightning's `Trainer` that logs every group's rate. LearningRateMonitor
    logs base rates::

        trainer = Trainer(callbacks=[LearningRateMonitor(), lightning_rates()])

    They are logged as often as the trainer logs. With several optimizers the names start with the
    optimizer's number.
    """
    package = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
    callbacks = import_module(f"{package}.callbacks")

    class Rates(callbacks.Callback):  # type: ignore[name-defined]
        """Logs the rates of the next step."""

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            for i, opt in enumerate(trainer.optimizers):
                prefix = f"{i}/" if len(trainer.optimizers) > 1 else ""
                for name, rate in group_rates(opt).items():
                    module.log(f"{prefix}{name}", rate)

    return Rates()
