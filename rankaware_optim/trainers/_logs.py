"""This module adds the learning rate of each LoRA rank to the logs of a trainer.

Importing this module does not import transformers or Lightning.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer, RateGroup
from ._trainer import External


def group_rates(opt: External) -> dict[str, float]:
    """Return a dict of an optimizer's learning rates by the names that are used in the
    training logs.

    The name of a learning rate states which parameters train at this learning rate. For
    example, "lr/r8" is the learning rate of the LoRA matrices of rank 8. If the LoRA
    matrices A and B have different learning rates, "lr/B/r8" is the learning rate of
    the B matrices of rank 8. If two parameter groups have different learning rates,
    "lr/group1/r8" is the learning rate of the rank 8 matrices in `param_groups[1]`.
    Parameters that do not belong to a LoRA matrix are logged as "lr/other", and fully
    finetuned weights as "lr/full". Frozen parameters are not logged.

    Args:
        opt: a `RankAwareOptimizer`, with or without a framework's wrapper around it. For
            any other optimizer the result is empty.
    """
    ours = _inside(opt)
    if not isinstance(ours, RankAwareOptimizer):
        return {}
    parts = [
        part
        for part in ours.rates.groups
        if any(param.requires_grad for param in part.params)
    ]
    # A name is precise enough if all its groups have the same learning rate. The initial
    # learning rate is compared too: at the first step of a warm-up every learning rate is
    # zero, and the names must not change later in the run.
    rates_of: dict[str, set[tuple[float, float]]] = {}
    for part in parts:
        for name in _names_of(part):
            rates_of.setdefault(name, set()).add((part.initial_lr, part.lr))
    rates = {}
    for part in parts:
        # The last name contains a parameter's name and is therefore unique, so next() always
        # finds a name.
        name = next(name for name in _names_of(part) if len(rates_of[name]) == 1)
        rates[f"lr/{name}"] = part.lr
    return rates


def _names_of(part: RateGroup) -> Iterator[str]:
    """Yield possible names under which the learning rate of a group of parameters is
    logged, from the shortest to the most precise name.

    The shortest of these names contains only the LoRA rank. Longer names also contain
    the LoRA matrix (A or B), the scaling factor of the adapter or the number of the
    parameter group.
    """
    group = f"group{part.user_group}"
    if part.rank is None:
        yield part.role
        yield f"{group}/{part.role}"
    else:
        yield f"r{part.rank}"
        yield f"{part.role}/r{part.rank}"
        yield f"r{part.rank}/s{part.scaling:g}"
        yield f"{group}/r{part.rank}"
        yield f"{group}/{part.role}/r{part.rank}"
        yield f"{group}/{part.role}/r{part.rank}/s{part.scaling:g}"
    yield f"{group}/{part.names[0]}"


def _inside(opt: External) -> External:
    """Return the optimizer inside a wrapper of a framework such as accelerate."""
    while not isinstance(opt, RankAwareOptimizer) and hasattr(opt, "optimizer"):
        opt = opt.optimizer
    return opt


def log_rates(trainer: External) -> None:
    """Log the learning rate of each LoRA rank in a `Trainer` of transformers.

    Without this function, `Trainer` logs only the base learning rate, under the name
    `learning_rate`. You do not need to call this function after `attach`, because
    `attach` calls it.

    Args:
        trainer: the trainer. Its reporters, such as TensorBoard's, also receive the
            learning rates.

    Raises:
        OptimizerError: `trainer` is not a Trainer of transformers. Later, `trainer.train()`
            raises this error if its optimizer is not a `RankAwareOptimizer`.
    """
    if not hasattr(trainer, "callback_handler"):
        kind = type(trainer).__name__
        raise OptimizerError(
            f"log_rates() needs a Trainer of transformers, but an object of class {kind} was"
            " passed.",
            "Call log_rates(trainer). For Lightning, use Trainer(callbacks=[lightning_rates()])"
            " instead.",
        )
    from transformers import TrainerCallback

    class LogRates(TrainerCallback):
        """This callback adds the learning rates of the last training step to the logs
        of the trainer.

        The callback also adds the attributes `report` and `rates` to the wrapper that
        accelerate puts around the optimizer.
        """

        def on_train_begin(
            self, args: External, state: External, control: External, **kwargs: External
        ) -> None:
            # Only now is it known which optimizer trains: Trainer builds it in train(), and
            # DeepSpeed, Unsloth or a subclass may have built a different one.
            wrapper = kwargs["optimizer"]
            opt = _inside(wrapper)
            if not isinstance(opt, RankAwareOptimizer):
                _refuse_other(args, type(opt).__name__)
            if wrapper is not opt:
                wrapper.report, wrapper.rates = opt.report, opt.rates
            if state.is_world_process_zero:
                _explain_names(opt)

        def on_pre_optimizer_step(self, *_: object, **kwargs: External) -> None:
            # the scheduler steps before on_log, so the learning rates are read here
            self.rates = group_rates(kwargs["optimizer"])

        def on_log(
            self,
            args: External,
            state: External,
            control: External,
            logs: External = None,
            **_: object,
        ) -> None:
            # Logs without a learning rate come from an evaluation or from the end of the
            # run. Trainer has already copied `logs` to its history, so both are updated.
            if "learning_rate" in logs:
                for entry in (logs, *state.log_history[-1:]):
                    entry.update(self.rates)

    # Callbacks run in the order of this list. At its end, after the reporters, the callback
    # would add the learning rates too late for them.
    trainer.callback_handler.callbacks.insert(0, LogRates())


def _refuse_other(args: External, kind: str) -> NoReturn:
    """Raise an `OptimizerError`, because the trainer did not build a
    `RankAwareOptimizer`.

    Args:
        args: the trainer's arguments.
        kind: the class of the optimizer that the trainer built.
    """
    if getattr(args, "embedding_learning_rate", None) is not None:
        raise OptimizerError(
            f"The trainer built another optimizer, {kind}, instead of the attached one, because"
            " embedding_learning_rate is set in the trainer's arguments.",
            "Remove embedding_learning_rate, and pass the learning rate of the embeddings to"
            " attach(): rates={'*modules_to_save*': embedding_lr}.",
        )
    raise OptimizerError(
        f"The trainer built another optimizer, {kind}, instead of the attached one.",
        "Remove create_optimizer from your subclass of Trainer, or remove the optimizer from"
        " DeepSpeed's configuration. If you need create_optimizer, build a RankAwareOptimizer in"
        " it and do not call attach().",
    )


def _explain_names(opt: External) -> None:
    """Print the names of the logged learning rates, if any of these learning rates
    differs from the base learning rate.
    """
    # if all multipliers are 1, learning_rate in the logs is already right
    if {group.multiplier for group in opt.rates.groups} == {1.0}:
        return
    names = ", ".join(group_rates(opt))
    words = "learning_rate is the base learning rate. The weights train at"
    print(f"rankaware: in the logs, {words}: {names}", file=sys.stderr, flush=True)


def lightning_rates() -> External:
    """Return a callback that logs the learning rate of each LoRA rank in Lightning.

    Lightning's LearningRateMonitor logs only the base learning rates::

        trainer = Trainer(callbacks=[LearningRateMonitor(), lightning_rates()])

    The callback logs learning rates at the same steps as the trainer. If the Lightning
    module has several optimizers, the name of each learning rate starts with the number
    of its optimizer, as in "0/lr/r8".
    """
    # Lightning is published as two packages with different classes
    package = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
    callbacks = import_module(f"{package}.callbacks")

    class Rates(callbacks.Callback):  # type: ignore[name-defined]
        """This callback logs the learning rates that the next training step will
        use.
        """

        def on_train_batch_start(
            self, trainer: External, module: External, *_: object
        ) -> None:
            for i, opt in enumerate(trainer.optimizers):
                prefix = f"{i}/" if len(trainer.optimizers) > 1 else ""
                for name, rate in group_rates(opt).items():
                    module.log(f"{prefix}{name}", rate)

    return Rates()
