"""The learning rates of all groups in the logs of a run.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer


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
