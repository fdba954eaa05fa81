"""Every group's rates in the logs of a run.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..optimizer import RankAwareOptimizer


def group_rates(opt: Any, *, moved: bool = False) -> dict[str, float]:
    """Return the rates at which an optimizer trains, each once: "lr/r8" for both factors of a rank,
    or "lr/A/r8" and "lr/B/r8" where they differ, and "lr/other".

    Args:
        opt: a `RankAwareOptimizer`, in a framework's wrapper or not. Another optimizer has none.
        moved: whether to leave out those that are the base rate.
    """
    ours = inside(opt)
    by_name: dict[str, dict[float, Any]] = {}
    for group in ours.rates.groups if isinstance(ours, RankAwareOptimizer) else []:
        if moved and group.multiplier == 1.0:
            continue
        name = group.role if group.rank is None else f"r{group.rank}"
        # rates that start alike, so that a warm-up from zero has the same names
        by_name.setdefault(name, {}).setdefault(group.initial_lr, group)
    rates = {}
    for name, groups in by_name.items():
        for group in groups.values():
            key = name if len(groups) == 1 else f"{group.role}/{name}"
            rates[f"lr/{key}"] = group.lr
    return rates


def inside(opt: Any) -> Any:
    """Return the `RankAwareOptimizer` in a framework's wrappers, or what is innermost."""
    while not isinstance(opt, RankAwareOptimizer) and hasattr(opt, "optimizer"):
        opt = opt.optimizer
    return opt


def log_rates(trainer: Any) -> None:
    """Let transformers' `Trainer` log the rates that it trains at where they differ from the base
    rate, which it logs as `learning_rate`. `attach` calls this function.

    Args:
        trainer: the trainer. Its reporters, such as TensorBoard's, get the rates too.
    """
    from transformers import TrainerCallback

    class LogRates(TrainerCallback):
        """Adds the rates of the last step to the training logs, as Trainer does for group 0."""

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            self.rates = group_rates(kwargs["optimizer"], moved=True)

        def on_log(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            logs = kwargs.get("logs") or {}
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

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            # as LearningRateMonitor does
            if not trainer._logger_connector.should_update_logs:
                return
            rates: dict[str, float] = {}
            for i, opt in enumerate(trainer.optimizers):
                prefix = f"{i}/" if len(trainer.optimizers) > 1 else ""
                for name, rate in group_rates(opt).items():
                    rates[f"{prefix}{name}"] = rate
            for logger in trainer.loggers:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_metrics(rates, step=step)

    return Rates()
