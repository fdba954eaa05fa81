"""For transformers' `Trainer`: the optimizer as a factory, and every group's rate in the logs.

Importing this module imports no transformers; `log_rates` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._optimizer_classes import get_optimizer_class
from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer

__all__ = ["TrainerFactory", "group_rates", "log_rates", "trainer_factory"]


class TrainerFactory:
    """What `Trainer` calls to make its optimizer, made by `trainer_factory`.

    Trainer calls a factory without arguments, and what that gives with the model as it has wrapped it: both are
    answered here.
    """

    def __init__(self, optimizer: type[Optimizer] | str, settings: Mapping[str, Any]) -> None:
        self.optimizer = optimizer
        self.settings = dict(settings)

    def __call__(self, model: Any = None, **settings: Any) -> Any:
        """This factory where no model is given, else a `RankAwareOptimizer` over the model's trainable parameters."""
        if model is None:
            return self
        if not isinstance(model, nn.Module):
            raise OptimizerError(
                f"Trainer handed a {type(model).__name__} to a factory, which needs the model.",
                "Update transformers to a release whose Trainer knows factories, or pass optimizers=(opt, None).",
            )
        return RankAwareOptimizer(model, self.optimizer, **{**self.settings, **settings})


def trainer_factory(optimizer: type[Optimizer] | str, **settings: Any) -> tuple[TrainerFactory, dict[str, Any]]:
    """What transformers' `Trainer(optimizer_cls_and_kwargs=...)` takes: a factory, called once the model is wrapped.

        Trainer(model, args, optimizer_cls_and_kwargs=trainer_factory(torch.optim.AdamW, recipe="recipe.toml"))

    The rate and weight decay of `TrainingArguments` do not reach a factory: give them here. A `weight_decay` holds
    for biases and norms too, unlike Trainer's own. Its scheduler, clipping and resuming are as ever.

    Args:
        optimizer: a torch optimizer class, or its name.
        **settings: the arguments of `RankAwareOptimizer` and the optimizer's own; `lr` or `recipe` is needed.

    Raises:
        OptimizerError: the optimizer is unknown, or no rate was given.
    """
    get_optimizer_class(optimizer)
    if settings.get("lr") is None and settings.get("recipe") is None:
        raise OptimizerError("trainer_factory was given no rate.", "Give lr= with tuned_at=, or recipe=.")
    return TrainerFactory(optimizer, settings), {}


def group_rates(opt: Any) -> dict[str, float]:
    """Every group's present rate by name, for any logger: "lr/A/r8", "lr/other"; numbered where a name recurs.

    `opt` may be a framework's wrapper: its `param_groups` are read.
    """
    names = [_group_name(group) for group in opt.param_groups]
    total, seen = Counter(names), Counter[str]()
    rates = {}
    for name, group in zip(names, opt.param_groups, strict=True):
        rates[f"{name}/{seen[name]}" if total[name] > 1 else name] = float(group["lr"])
        seen[name] += 1
    return rates


def _group_name(group: Mapping[str, Any]) -> str:
    rank = group.get("lora_rank")
    return f"lr/{group.get('lora_role', 'other')}" + ("" if rank is None else f"/r{rank}")


def log_rates(trainer: Any = None) -> Any:
    """A callback for transformers' `Trainer` that logs every group's rate; Trainer itself logs that of group 0 alone.

        trainer = Trainer(model, args, callbacks=[log_rates()])     # log history, console
        log_rates(trainer)                                          # reporters such as TensorBoard too

    Trainer tells its reporters before the callbacks it is given, so the first form comes too late for them: the
    second puts the callback in front.

    Raises:
        OptimizerError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise OptimizerError("log_rates is for transformers, which is not installed.", "Install it.") from error

    callback = type("LogRates", (_LogRates, TrainerCallback), {"__doc__": _LogRates.__doc__})()
    if trainer is not None:
        trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class _LogRates:
    """Adds to what is logged while training the rates of the step just taken, as Trainer does for group 0."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = group_rates(kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "learning_rate" not in logs:
            return
        logs.update(self.rates)
        if state.log_history:
            state.log_history[-1].update(self.rates)
