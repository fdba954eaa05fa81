"""An optimizer factory with the signature of PEFT's `create_loraplus_optimizer`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._optimizers import get_optimizer_class
from .._rate import Rate
from ..optimizer import RankAwareOptimizer
from ._training_arguments import check_given, settings_of
from ._transformers import TrainerFactory


def create_rankaware_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] | str,
    *,
    lr: float | Rate | None = None,
    **kwargs: Any,
) -> RankAwareOptimizer:
    """Create a `RankAwareOptimizer` with the signature of PEFT's `create_loraplus_optimizer`::

        opt = create_rankaware_optimizer(model, torch.optim.AdamW, lr=2e-4, tuned_at=Reference(rank=16, alpha=32))

    As in PEFT, norms and biases get no weight decay, and an 8-bit optimizer of bitsandbytes keeps
    the state of embeddings in 32 bits.

    Args:
        model: the model with its adapters.
        optimizer_cls: a torch optimizer class, or its name.
        lr: the base rate, per step, tuned at `tuned_at`. Leave it out with `recipe`.
        **kwargs: the other arguments of `RankAwareOptimizer`, and the optimizer's own.

    Raises:
        OptimizerError: no rate was given; or as `RankAwareOptimizer`.
    """
    native = get_optimizer_class(optimizer_cls)
    settings = settings_of(native, None, {"lr": lr, **kwargs})
    check_given("create_rankaware_optimizer", native, None, settings)
    make = TrainerFactory(partial(RankAwareOptimizer, optimizer=native), native, settings)
    made: RankAwareOptimizer = make(model)
    return made
