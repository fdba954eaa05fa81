"""Every group's rates in the logs of a run.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from importlib import import_module
from typing import Any

from ..errors import OptimizerError
from ..optimizer import effective_lr


def group_rates(opt: Any) -> dict[str, float]:
    """Return every group's rate: "lr/A/r8" = "base_lr/A/r8" × "rank_multiplier/A/r8". Repeated
    names are numbered.

    Args:
        opt: the optimizer, or a framework's wrapper with `param_groups`. Its base rates are those
            that schedulers and trainers set and log.
    """
    names = []
    for group in opt.param_groups:
        role, rank = group.get("lora_role", "other"), group.get("lora_rank")
        names.append(role if rank is None else f"{role}/r{rank}")
    number = Counter[str]()
    rates = {}
    for name, group in zip(names, opt.param_groups, strict=True):
        unique = name if names.count(name) == 1 else f"{name}/{number[name]}"
        number[name] += 1
        lr, multiplier = effective_lr(group), float(group.get("rank_multiplier", 1.0))
        rates[f"lr/{unique}"] = lr
        rates[f"base_lr/{unique}"] = lr / multiplier
        rates[f"rank_multiplier/{unique}"] = multiplier
    return rates


def log_rates(trainer: Any) -> None:
    """Let transformers' `Trainer` log every group's rate. It logs that of group 0. `attach` calls
    this function.

    Args:
        trainer: the trainer. Its reporters, such as TensorBoard's, get the rates too.

    Raises:
        OptimizerError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise OptimizerError(
            "log_rates is for transformers, which is not installed.", "Install it."
        ) from error

    class LogRates(TrainerCallback):
        """Adds the rates of the last step to the training logs, as Trainer does for group 0."""

        def __init__(self) -> None:
            self.rates: dict[str, float] = {}

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            self.rates = group_rates(kwargs["optimizer"])

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

    Raises:
        OptimizerError: neither lightning nor pytorch_lightning is installed.
    """
    for package in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            callbacks = import_module(f"{package}.callbacks")
            break
    else:
        raise OptimizerError(
            "lightning_rates is for Lightning, which is not installed.", "Install it."
        )

    class Rates(callbacks.Callback):  # type: ignore[name-defined]
        """Logs the rates of the next step."""

        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, number: int
        ) -> None:
            # as LearningRateMonitor does
            if not trainer._logger_connector.should_update_logs:
                return
            rates: dict[str, float] = {}
            for i, opt in enumerate(trainer.optimizers):
                prefix = f"{i}/" if len(trainer.optimizers) > 1 else ""
                for name, rate in group_rates(opt).items():
                    rates[f"{prefix}{name}"] = rate
            for logger in trainer.loggers:
                logger.log_metrics(
                    rates, step=trainer.fit_loop.epoch_loop._batches_that_stepped
                )

    return Rates()
