"""One line for a trainer that is built: transformers' `Trainer`, TRL's, Axolotl's, ms-swift's.

Importing this module imports none of them.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer

from .._optimizer_classes import get_optimizer_class
from .._warn import warn
from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer
from ._training_arguments import refuse_no_rate, settings_of
from ._transformers import TrainerFactory, log_rates


def attach(trainer: Any, optimizer: type[Optimizer] | str | None = None, **settings: Any) -> None:
    """Let a trainer of transformers or TRL, built and not yet trained, train with a `RankAwareOptimizer`.

        trainer = GRPOTrainer(model, rewards, args=args, train_dataset=data)
        ra.integrations.attach(trainer, torch.optim.AdamW, lr=2e-4, tuned_at=ra.Reference(rank=16, alpha=32))
        trainer.train()

    The optimizer is made once the trainer has wrapped its model. The weight decay of the trainer's arguments, and a
    rate, betas and epsilon that were set there, hold unless they are given here; norms and biases take no decay, as in
    Trainer's own optimizers. Every group's rate is logged, the report is printed once, when it is made, and
    `trainer.optimizer.report()` works under accelerate's wrapper too.

    Args:
        trainer: transformers' `Trainer` or one derived from it.
        optimizer: a torch optimizer class, or its name; by default the one that the trainer would make.
        **settings: the arguments of `RankAwareOptimizer` and the optimizer's own. A rate or `recipe` is needed.

    Raises:
        OptimizerError: it is no such trainer, has an optimizer already, or no rate was given; nothing was changed.
    """
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "optimizer_cls_and_kwargs"):
        raise OptimizerError(
            f"attach got a {type(trainer).__name__}, which is no Trainer of transformers.",
            "Give transformers' or TRL's trainer; for Lightning build the optimizer in configure_optimizers.",
        )
    own = trainer.optimizer_cls_and_kwargs
    if trainer.optimizer is not None or (own is not None and optimizer is not None):
        raise OptimizerError(
            "The trainer has an optimizer of its own.",
            "Leave optimizers= and optimizer_cls_and_kwargs= out, and attach once, before training.",
        )
    native = None if optimizer is None else get_optimizer_class(optimizer)
    if native is None:
        native, chosen = _own_choice(trainer, own)
        settings = {**chosen, **settings}
    refuse_no_rate("attach", settings_of(native, trainer.args, settings))
    printed = trainer.is_world_process_zero()

    def make(params: Any, **said: Any) -> RankAwareOptimizer:
        opt = RankAwareOptimizer(params, native, **said)
        if printed:  # here, where a warm-up has not put the rates to zero yet
            print(opt.report(), flush=True)
        return opt

    held = weakref.ref(trainer)
    factory = TrainerFactory(make, native, settings, trainer.args, lambda: getattr(held(), "model", None))
    trainer.optimizer_cls_and_kwargs = (factory, {})
    log_rates(trainer)
    trainer.add_callback(_look())


def _own_choice(trainer: Any, own: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class that the trainer would build, and its settings but for the rate, which may be a default."""
    native, chosen = own or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if {"params", "model", "optimizer_dict"} & chosen.keys() or not isinstance(native, type):
        raise OptimizerError(
            f"The trainer's own optimizer, {getattr(trainer.args, 'optim', native)}, makes its groups itself.",
            "Name another class: attach(trainer, torch.optim.AdamW, ...).",
        )
    return get_optimizer_class(native), {name: value for name, value in chosen.items() if name != "lr"}


def _look() -> Any:
    """A callback that looks, when training begins, at what the trainer made and what accelerate wrapped around it."""
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        """Lends the wrapper `report` and `expand`, and says so where the trainer has made another optimizer."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            outer = opt = kwargs["optimizer"]
            while not isinstance(opt, RankAwareOptimizer) and isinstance(getattr(opt, "optimizer", None), Optimizer):
                opt = opt.optimizer
            if not isinstance(opt, RankAwareOptimizer):
                _warn_of_another(args, opt)
            elif outer is not opt:
                outer.report, outer.expand = opt.report, opt.expand

    return Look()


def _warn_of_another(args: Any, opt: Any) -> None:
    own = getattr(args, "embedding_learning_rate", None)
    cure = "give attach's settings to the optimizer that it makes."
    if own is not None:
        cure = (
            "leave embedding_learning_rate out, by which Unsloth makes an optimizer of its own, and give attach "
            f"rates={{'*modules_to_save*': {own:g}}}."
        )
    warn(f"The trainer made a {type(opt).__name__} of its own, and what was attached is ignored: {cure}")
