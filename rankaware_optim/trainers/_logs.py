"""The learning rates of all groups in the logs of a run.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer, RateGroup
from ._trainer import External


def group_rates(opt: External) -> dict[str, float]:
    """Return the learning rates at which an optimizer trains, by names that say of what.

    Each is the shortest name whose parameters all train at one learning rate: "lr/r8" for the LoRA
    matrices of rank 8, "lr/B/r8" for the matrices B among them, "lr/group1/r8" for those in
    `param_groups[1]`. "lr/other" is for parameters that are no LoRA matrix, and "lr/full" for full
    finetuning. Parameters that do not train are left out.

    Args:
        opt: a `RankAwareOptimizer`, in a framework's wrapper or not. For another optimizer the
            result is empty.
    """
    ours = _inside(opt)
    if not isinstance(ours, RankAwareOptimizer):
        return {}
    parts = [
        part
        for part in ours.rates.groups
        if any(param.requires_grad for param in part.params)
    ]
    # The start of the schedule counts too, so that a warm-up from zero has the same names.
    rates_of: dict[str, set[tuple[float, float]]] = {}
    for part in parts:
        for name in _names_of(part):
            rates_of.setdefault(name, set()).add((part.initial_lr, part.lr))
    rates = {}
    for part in parts:
        name = next(name for name in _names_of(part) if len(rates_of[name]) == 1)
        rates[f"lr/{name}"] = part.lr
    return rates


def _names_of(part: RateGroup) -> Iterator[str]:
    """Yield names of a part, from the most general to its own: by rank, LoRA matrix, scaling (s)
    and group.
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
    """Return the `RankAwareOptimizer` inside a framework's wrappers, else the innermost one."""
    while not isinstance(opt, RankAwareOptimizer) and hasattr(opt, "optimizer"):
        opt = opt.optimizer
    return opt


_OF_ITS_OWN = (
    "Remove the cause: create_optimizer of a subclass, the optimizer in DeepSpeed's"
    " configuration, or Unsloth's embedding_learning_rate. Instead of the last one pass"
    " rates={'*modules_to_save*': ...} to attach. Or build a RankAwareOptimizer there, and remove"
    " attach."
)


def log_rates(trainer: External) -> None:
    """Let transformers' `Trainer` log the learning rates at which it trains. Trainer itself logs
    the base learning rate, as `learning_rate`. `attach` calls this function.

    Args:
        trainer: the trainer. Its reporters, such as TensorBoard's, get the learning rates too.

    Raises:
        OptimizerError: it is not a Trainer of transformers. `train` raises one if the trainer's
            optimizer is not a `RankAwareOptimizer`.
    """
    if not hasattr(trainer, "callback_handler"):
        raise OptimizerError(
            f"log_rates got a {type(trainer).__name__}, which is not a Trainer of transformers.",
            "Pass the trainer: log_rates(trainer). For Lightning use lightning_rates().",
        )
    from transformers import TrainerCallback

    class LogRates(TrainerCallback):
        """Adds the learning rates of the last step to the training logs, as Trainer does for group
        0. It also gives accelerate's wrapper of the optimizer `report` and `rates`.
        """

        def on_train_begin(
            self, args: External, state: External, control: External, **kwargs: External
        ) -> None:
            wrapper = kwargs["optimizer"]
            opt = _inside(wrapper)
            if not isinstance(opt, RankAwareOptimizer):
                raise OptimizerError(
                    f"The trainer has built its own {type(opt).__name__}, so it would not train"
                    " with the attached optimizer.",
                    _OF_ITS_OWN,
                )
            if wrapper is not opt:
                wrapper.report, wrapper.rates = opt.report, opt.rates
            if state.is_world_process_zero:
                _explain_names(opt)

        def on_pre_optimizer_step(self, *_: object, **kwargs: External) -> None:
            self.rates = group_rates(kwargs["optimizer"])

        def on_log(
            self,
            args: External,
            state: External,
            control: External,
            logs: External = None,
            **_: object,
        ) -> None:
            if "learning_rate" in logs:
                for entry in (logs, *state.log_history[-1:]):
                    entry.update(self.rates)

    # Trainer calls its reporters before the callbacks that it is given
    trainer.callback_handler.callbacks.insert(0, LogRates())


def _explain_names(opt: External) -> None:
    """Print which of the logged learning rates train, if they differ from the base rate."""
    if {group.multiplier for group in opt.rates.groups} == {1.0}:
        return
    names = ", ".join(group_rates(opt))
    words = "learning_rate is the base learning rate, and these train"
    print(f"rankaware: in the logs, {words}: {names}", file=sys.stderr, flush=True)


def lightning_rates() -> External:
    """Return a callback for Lightning's `Trainer` that logs the learning rates at which it trains.
    LearningRateMonitor logs base learning rates::

        trainer = Trainer(callbacks=[LearningRateMonitor(), lightning_rates()])

    The callback logs as often as the trainer does. With several optimizers the names start with the
    number of the optimizer.
    """
    package = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
    callbacks = import_module(f"{package}.callbacks")

    class Rates(callbacks.Callback):  # type: ignore[name-defined]
        """Logs the learning rates of the next step."""

        def on_train_batch_start(
            self, trainer: External, module: External, *_: object
        ) -> None:
            for i, opt in enumerate(trainer.optimizers):
                prefix = f"{i}/" if len(trainer.optimizers) > 1 else ""
                for name, rate in group_rates(opt).items():
                    module.log(f"{prefix}{name}", rate)

    return Rates()
