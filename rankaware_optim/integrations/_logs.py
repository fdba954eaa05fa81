"""Every group's rates in the logs of a run.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import chain
from typing import Any

from ..errors import OptimizerError
from ..optimizer import effective_lr


def group_rates(opt: Any) -> dict[str, float]:
    """Return the rates at which an optimizer trains, each once: "lr/r8" for both factors of a rank,
    or "lr/A/r8" and "lr/B/r8" where they differ, and "lr/other". Groups of one name at different
    rates are numbered.

    Args:
        opt: the optimizer, or a framework's wrapper with `param_groups`.
    """
    return rates_of(opt.param_groups)


def rates_of(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return `group_rates` of some groups."""
    by_name: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for group in groups:
        name = role = group.get("lora_role", "other")
        if group.get("lora_rank") is not None:
            name = f"r{group['lora_rank']}"
            role = f"{role}/{name}"
        by_name.setdefault(name, {}).setdefault(role, []).append(group)
    rates = {}
    for name, by_role in by_name.items():
        distinct = _distinct(chain(*by_role.values()))
        if len(distinct) == 1:
            rates[f"lr/{name}"] = distinct[0]
            continue
        for role, of_role in by_role.items():
            own = _distinct(of_role)
            for number, rate in enumerate(own):
                rates[f"lr/{role}/{number}" if len(own) > 1 else f"lr/{role}"] = rate
    return rates


def _distinct(groups: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the rates of groups, one for those that start alike, so that a warm-up from zero has
    the same names.
    """
    by_start = {}
    for group in groups:
        start = {**group, "lr": group.get("initial_lr", group["lr"])}
        by_start[effective_lr(start)] = effective_lr(group)
    return list(by_start.values())


def log_rates(trainer: Any) -> None:
    """Let transformers' `Trainer` log the rates that it trains at where they differ from the base
    rate, which it logs as `learning_rate`. `attach` calls this function.

    Args:
        trainer: the trainer. Its reporters, such as TensorBoard's, get the rates too.
    """
    from transformers import TrainerCallback

    class LogRates(TrainerCallback):
        """Adds the rates of the last step to the training logs, as Trainer does for group 0."""

        def __init__(self) -> None:
            self.rates: dict[str, float] = {}

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            groups = kwargs["optimizer"].param_groups
            moved = [g for g in groups if g.get("rank_multiplier", 1.0) != 1.0]
            self.rates = rates_of(moved)

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
