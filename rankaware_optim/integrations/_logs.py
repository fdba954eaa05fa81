"""Every group's rates in the logs of a run.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple

from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer


def group_rates(opt: Any) -> dict[str, float]:
    """Return the rates at which an optimizer trains, each once: "lr/r8" for both factors of a rank,
    or "lr/A/r8" and "lr/B/r8" where they differ, and "lr/other". Groups of one name at different
    rates are numbered.

    Args:
        opt: a `RankAwareOptimizer`, in a framework's wrapper or not. Another optimizer's groups,
            such as those of `rank_aware_param_groups`, are taken as they are.
    """
    return _named(_rates_of(opt))


class _Rate(NamedTuple):
    """A rate, the one from which its schedule started, and what trains at it."""

    lr: float
    initial_lr: float
    multiplier: float
    role: str
    rank: int | None


def _rates_of(opt: Any) -> list[_Rate]:
    wrapped = opt
    while not isinstance(wrapped, RankAwareOptimizer):
        wrapped = getattr(wrapped, "optimizer", None)
        if wrapped is None:
            return [_native(group) for group in opt.param_groups]
    return [
        _Rate(g.lr, g.initial_lr, g.multiplier, g.role, g.rank)
        for g in wrapped.rates.groups
    ]


def _native(group: Mapping[str, Any]) -> _Rate:
    lr = float(group["lr"])
    start, role = float(group.get("initial_lr", lr)), group.get("lora_role", "other")
    return _Rate(lr, start, 1.0, role, group.get("lora_rank"))


def _named(rates: Iterable[_Rate]) -> dict[str, float]:
    by_name: dict[str, dict[str, list[_Rate]]] = {}
    for rate in rates:
        name = role = rate.role
        if rate.rank is not None:
            name = f"r{rate.rank}"
            role = f"{role}/{name}"
        by_name.setdefault(name, {}).setdefault(role, []).append(rate)
    named = {}
    for name, by_role in by_name.items():
        distinct = _distinct(chain(*by_role.values()))
        if len(distinct) == 1:
            named[f"lr/{name}"] = distinct[0]
            continue
        for role, of_role in by_role.items():
            own = _distinct(of_role)
            for number, lr in enumerate(own):
                named[f"lr/{role}/{number}" if len(own) > 1 else f"lr/{role}"] = lr
    return named


def _distinct(rates: Iterable[_Rate]) -> list[float]:
    """Return the rates, one for those that start alike, so that a warm-up from zero has the same
    names.
    """
    return list({rate.initial_lr: rate.lr for rate in rates}.values())


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
            rates = _rates_of(kwargs["optimizer"])
            self.rates = _named(rate for rate in rates if rate.multiplier != 1.0)

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
