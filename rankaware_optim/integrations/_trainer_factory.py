"""The optimizer as a factory, for `Trainer` of transformers and its subclasses, and for PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._optimizers import get_optimizer_class
from .._rate import Rate
from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer
from ._settings import (
    check_rate,
    keep_embeddings_in_32_bits,
    settings_of,
    trainer_groups,
)


@dataclass(frozen=True)
class TrainerFactory:
    """The factory that `Trainer` calls to make its optimizer.

    Trainer calls a factory without arguments, and then its result with the wrapped model. Axolotl
    adds its arguments. Older versions, and Unsloth on a CPU with a rate for embeddings, pass
    groups. All of these work.

    Args:
        make: `make(params, model=..., **settings)` builds the optimizer.
        native: the class that is wrapped.
        settings: the user's. Without a rate or a recipe, the rate is that of the arguments at each
            call.
        args: the arguments of a trainer that does not pass them.
        model: returns the model of a trainer that does not pass it.
    """

    make: Callable[..., Optimizer]
    native: type[Optimizer]
    settings: Mapping[str, Any]
    args: Any = None
    model: Callable[[], Any] = lambda: None

    def __call__(self, params: Any = None, args: Any = None, **settings: Any) -> Any:
        """Return this factory if there are no arguments, else an optimizer for a model or for
        groups.
        """
        if params is None:
            return self
        args = self.args if args is None else args
        model = params if isinstance(params, nn.Module) else self.model()
        if model is None:
            raise OptimizerError(
                f"Trainer passed a {type(params).__name__} to a factory, which needs the model.",
                "Use attach(trainer, ...), a version of transformers with factories, or"
                " optimizers=(opt, None).",
            )
        settings = settings_of(self.native, args, {**settings, **self.settings})
        keep_embeddings_in_32_bits(model, self.native, settings)
        if params is model:
            return self.make(
                trainer_groups(model, self.native), model=model, **settings
            )
        groups = [dict(group) for group in params]
        for group in groups:
            if group.get("lr") == getattr(args, "learning_rate", None):
                group.pop("lr", None)  # a group at the trainer's base rate gets ours
        return self.make(groups, model=model, **settings)


def trainer_factory(
    optimizer: type[Optimizer] | str, *, args: Any = None, **settings: Any
) -> tuple[TrainerFactory, dict[str, Any]]:
    """Return a factory for transformers' `Trainer(optimizer_cls_and_kwargs=...)`. It gets the
    wrapped model::

        factory = trainer_factory(torch.optim.AdamW, args=args, recipe="recipe.toml")
        Trainer(model, args, optimizer_cls_and_kwargs=factory)

    For a trainer that is already built, `attach` does the same, and also logs and reports. Norms
    and biases get no weight decay, as in Trainer. Trainer's scheduler, clipping and resuming work
    as usual.

    Args:
        optimizer: a torch optimizer class, or its name.
        args: the trainer's `TrainingArguments`. Weight decay, and rate, betas and epsilon if they
            were set, are used unless they are given here. Trainer does not pass its arguments to a
            factory, Axolotl does.
        **settings: the arguments of `RankAwareOptimizer` and the optimizer's own. A rate or
            `recipe` is required.

    Raises:
        OptimizerError: the optimizer is unknown, or no rate was given.
    """
    native = get_optimizer_class(optimizer)
    check_rate("trainer_factory", args, settings)
    make = partial(RankAwareOptimizer, optimizer=native)
    return TrainerFactory(make, native, settings, args), {}


def create_rankaware_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] | str,
    *,
    lr: float | Rate | None = None,
    **kwargs: Any,
) -> RankAwareOptimizer:
    """Create a `RankAwareOptimizer` with the signature of PEFT's `create_loraplus_optimizer`::

        opt = create_rankaware_optimizer(model, "adamw", lr=2e-4, tuned_at="r=16,alpha=32")

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
    settings = {"lr": lr, **kwargs}
    native = get_optimizer_class(optimizer_cls)
    check_rate("create_rankaware_optimizer", None, settings)
    make = partial(RankAwareOptimizer, optimizer=native)
    opt: RankAwareOptimizer = TrainerFactory(make, native, settings)(model)
    return opt
