"""For transformers' `Trainer`: the optimizer as a factory, and every group's rate in the logs.

Importing this module imports no transformers; `log_rates()` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .errors import OptimizerError
from .optimizer import RankAwareOptimizer

__all__ = ["RankAwareFactory", "group_rates", "log_rates", "trainer_factory"]


class RankAwareFactory:
    """What `Trainer` calls to make its optimizer, once it has wrapped the model; made by `trainer_factory`.

    Trainer calls a factory first without arguments, then with the model: both calls are answered here.
    """

    def __init__(self, optimizer: type[Optimizer] | str, settings: Mapping[str, Any]) -> None:
        self.optimizer = optimizer
        self.settings = dict(settings)

    def __call__(self, model: Any = None, **settings: Any) -> Any:
        """The factory itself without a model, else a `RankAwareOptimizer` over the model's trainable parameters."""
        if model is None:
            return self
        if not isinstance(model, nn.Module):
            raise OptimizerError(
                f"Trainer handed over {type(model).__name__} where a factory gets the model.",
                "Update transformers to a release whose Trainer knows factories, or pass optimizers=(opt, None).",
            )
        return RankAwareOptimizer(model, self.optimizer, **{**self.settings, **settings})


def trainer_factory(
    optimizer: type[Optimizer] | str, **settings: Any
) -> tuple[RankAwareFactory, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: a factory that gets the model as Trainer has wrapped it.

        Trainer(model, args, optimizer_cls_and_kwargs=trainer_factory(torch.optim.AdamW, recipe="recipe.toml"))

    `TrainingArguments.learning_rate` and `weight_decay` do not reach a factory: give `lr` or a recipe, and
    `weight_decay`, which holds for biases and norms too. Trainer's scheduler and resuming work as ever.

    Args:
        optimizer: a torch optimizer class, or its name.
        **settings: those of `RankAwareOptimizer` and the optimizer's own.

    Raises:
        OptimizerError: neither `lr` nor `recipe` was given, or both.
    """
