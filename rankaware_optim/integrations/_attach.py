"""`attach`: an optimizer for a trainer of transformers, TRL, Axolotl or ms-swift that is built
already.

Importing this module imports none of them.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer

from .._optimizers import get_optimizer_class
from .._warn import warn
from ..errors import CheckpointError, OptimizerError
from ..optimizer import RankAwareOptimizer
from ._training_arguments import check_given
from ._transformers import TrainerFactory, log_rates


def attach(trainer: Any, optimizer: type[Optimizer] | str | None = None, **settings: Any) -> None:
    """Let a trainer of transformers or TRL train with a `RankAwareOptimizer`. Call it before
    training::

        trainer = GRPOTrainer(model, rewards, args=args, train_dataset=data)
        ra.integrations.attach(trainer, torch.optim.AdamW, lr=2e-4, tuned_at=ra.Reference(rank=16, alpha=32))
        trainer.train()

    The optimizer is made when the trainer has wrapped its model. Weight decay, and rate, betas and
    epsilon if they were set, come from the trainer's arguments unless they are given here. Norms
    and biases get no weight decay, as in Trainer. Every group's rate is logged, and the report is
    printed once. `trainer.optimizer.report()` works with accelerate's wrapper too.

    Args:
        trainer: transformers' `Trainer` or a subclass.
        optimizer: a torch optimizer class, or its name. By default the one that the trainer would
            make.
        **settings: the arguments of `RankAwareOptimizer` and the optimizer's own. A rate or
            `recipe` is required.

    Raises:
        OptimizerError: it is not such a trainer, it has an optimizer already, or no rate was given.
            Nothing was changed.
    """
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "optimizer_cls_and_kwargs"):
        raise OptimizerError(
            f"attach got a {type(trainer).__name__}, which is not a Trainer of transformers.",
            "Give a trainer of transformers or TRL. For Lightning build the optimizer in"
            " configure_optimizers.",
        )
    own = trainer.optimizer_cls_and_kwargs
    if trainer.optimizer is not None or (own is not None and optimizer is not None):
        raise OptimizerError(
            "The trainer already has an optimizer.",
            "Leave optimizers= and optimizer_cls_and_kwargs= out, and attach once, before"
            " training.",
        )
    native = None if optimizer is None else get_optimizer_class(optimizer)
    if native is None:
        native, chosen = _own_choice(trainer, own)
        if own is None and settings.get(
            "apply_settings"
        ):  # the recipe's replace the arguments' defaults
            chosen = {name: value for name, value in chosen.items() if name not in ("betas", "eps")}
        settings = {**chosen, **settings}
    check_given("attach", native, trainer.args, settings)
    printed = trainer.is_world_process_zero()

    def make(params: Any, **said: Any) -> RankAwareOptimizer:
        opt = RankAwareOptimizer(params, native, **said)
        if printed and isinstance(
            opt, RankAwareOptimizer
        ):  # here, before a warm-up has set the rates to zero
            print(opt.report(), flush=True)
        return opt

    factory = TrainerFactory(make, native, settings, trainer.args, _ModelOf(trainer))
    trainer.optimizer_cls_and_kwargs = (factory, {})
    log_rates(trainer)
    if not settings.get("native_type"):
        trainer.add_callback(_look())


class _ModelOf:
    """Returns the trainer's model. The reference is weak, since the trainer holds it, and can be
    pickled for Ray.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)

    def __call__(self) -> Any:
        return getattr(self._trainer(), "model", None)

    def __reduce__(self) -> Any:
        return _ModelOf, (self._trainer(),)


def _own_choice(trainer: Any, own: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class that the trainer would build, and its settings without the rate, which may
    be a default.
    """
    native, chosen = own or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if {"params", "model", "optimizer_dict"} & chosen.keys() or not isinstance(native, type):
        raise OptimizerError(
            f"The trainer's own optimizer, {getattr(trainer.args, 'optim', native)}, makes its"
            " groups itself.",
            "Give another class: attach(trainer, torch.optim.AdamW, ...).",
        )
    return get_optimizer_class(native), {
        name: value for name, value in chosen.items() if name != "lr"
    }


def _look() -> Any:
    """Return a callback that checks the trainer's optimizer and scheduler, and accelerate's
    wrapper, at the start.
    """
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        """Gives the wrapper `report` and `expand`, and warns if the trainer has made another
        optimizer.
        """

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            outer = opt = kwargs["optimizer"]
            while (
                not isinstance(opt, RankAwareOptimizer)
                and getattr(opt, "optimizer", None) is not None
            ):
                opt = opt.optimizer
            if not isinstance(opt, RankAwareOptimizer):
                _warn_of_another(args, opt)
                return
            _refuse_plain_scheduler(kwargs["lr_scheduler"], opt)
            if outer is not opt:
                outer.report, outer.expand = opt.report, opt.expand

    return Look()


def _refuse_plain_scheduler(scheduler: Any, opt: RankAwareOptimizer) -> None:
    """Raise if a checkpoint's scheduler has rates for another number of groups. Older torch skips
    groups silently.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # inside accelerate's
    rates = getattr(scheduler, "base_lrs", getattr(scheduler, "min_lrs", opt.param_groups))
    if len(rates) != len(opt.param_groups):
        raise CheckpointError(
            f"The checkpoint's scheduler has rates for {len(rates)} groups, and this optimizer has "
            f"{len(opt.param_groups)}. It was saved by a run without attach.",
            "Finish that run without attach, or start a new run from its weights.",
        )


def _warn_of_another(args: Any, opt: Any) -> None:
    own = getattr(args, "embedding_learning_rate", None)
    cure = "give attach's settings to the optimizer that it makes."
    if own is not None:
        cure = (
            "leave embedding_learning_rate out, which makes Unsloth build its own optimizer, and"
            f" give attach rates={{'*modules_to_save*': {own:g}}}."
        )
    warn(
        f"The trainer made its own {type(opt).__name__}, and the attached optimizer is ignored:"
        f" {cure}"
    )
