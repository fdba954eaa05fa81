"""The factory that a `Trainer` of transformers calls to make its optimizer.

Importing this module does not import transformers. Its functions do.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import OptimizerError
from ..optimizer import RankAwareOptimizer


class TrainerFactory:
    """Makes an optimizer at the settings of a trainer's arguments.

    Trainer calls a factory without arguments, and then its result with the wrapped model. Older
    versions, and Unsloth on a CPU with a rate for embeddings, pass groups.

    Args:
        trainer: the trainer. It holds the factory, so the reference is weak.
        native: the class that is wrapped.
        settings: the user's. Without a rate or a recipe, the rate is that of the arguments at each
            call. With a rate too, once a search or the user has written another into them.
        make: `make(params, model=..., **settings)` builds the optimizer. It is called twice under
            DeepSpeed.
        written: the rate of the arguments when an optimizer was last made, None before.
    """

    def __init__(
        self,
        trainer: Any,
        native: type[Optimizer],
        settings: Mapping[str, Any],
        make: Callable[..., RankAwareOptimizer],
        written: float | None = None,
    ) -> None:
        self._trainer = weakref.ref(trainer)
        self._written = written
        self._native = native
        self._settings = settings
        self._make = make

    def __reduce__(self) -> Any:
        """Let Ray's search send a trainer to another process."""
        return TrainerFactory, (
            self._trainer(),
            self._native,
            self._settings,
            self._make,
            self._written,
        )

    def __call__(self, params: Any = None, **_: Any) -> Any:
        """Return this factory if there are no parameters, else an optimizer for a model or for
        groups.
        """
        if params is None:
            return self
        trainer: Any = self._trainer()
        args = trainer.args
        settings = trainer_settings(self._native, args, self._settings)
        if self._written not in (None, args.learning_rate):
            _follow(args.learning_rate, settings)
        if isinstance(params, nn.Module):
            model, groups = params, trainer_groups(params)
        else:
            model, groups = trainer.model, [dict(group) for group in params]
            for group in groups:
                if group.get("lr") == args.learning_rate:
                    group.pop(
                        "lr", None
                    )  # a group at the trainer's base rate gets ours
        keep_embeddings_in_32_bits(model, self._native, settings)
        make = partial(self._make, model=model, **settings)
        if trainer.is_deepspeed_enabled:
            # ZeRO flattens every group, so each part is a group of its own
            parts = make([dict(group) for group in groups]).rates.groups
            groups = [{**groups[p.user_group], "params": list(p.params)} for p in parts]
        opt = make(groups)
        self._written = args.learning_rate
        return opt


def _follow(lr: float, settings: dict[str, Any]) -> None:
    """Take a rate that was written into the trainer's arguments since, as a search does."""
    if "recipe" in settings:
        raise OptimizerError(
            f"learning_rate={lr:g} was written into the trainer's arguments, as by a search, after"
            " attach was given a recipe, whose rate it is not.",
            "Leave learning_rate out of the search, or attach with lr= and tuned_at=.",
        )
    settings["lr"] = lr


def trainer_settings(
    native: type[Optimizer], args: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the user's settings, completed by those of `args` that `native` accepts. With a
    recipe, without a rate.

    The arguments give the rate and the weight decay, which Trainer always passes, and betas and eps
    if they were set. Where they have their default values, the class's own defaults are used.
    Lion's second beta is 0.99, for example.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    # also a default rate, which a search may try
    trainers: dict[str, Any] = {"weight_decay": args.weight_decay}
    if "recipe" not in settings:
        settings.setdefault("lr", args.learning_rate)
    changed = changed_arguments(args)
    if {"adam_beta1", "adam_beta2"} & changed:
        trainers["betas"] = (args.adam_beta1, args.adam_beta2)
    if "adam_epsilon" in changed:
        trainers["eps"] = args.adam_epsilon
    for name, value in trainers.items():
        if _takes(native, name, value):
            settings.setdefault(name, value)
    return settings


def changed_arguments(args: Any) -> set[str]:
    """Return the names of the arguments that differ from their defaults."""
    return {f.name for f in fields(args) if getattr(args, f.name) != f.default}


def _takes(native: type[Optimizer], name: str, value: Any) -> bool:
    """Return whether a class has this setting, and in this form: Adafactor's eps are two."""
    parameters = inspect.signature(native).parameters
    if name not in parameters or name == "weight_decay":
        return name in parameters
    default = parameters[name].default
    if isinstance(value, tuple):
        return isinstance(default, tuple) and len(default) == len(value)
    return isinstance(default, float)


def trainer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return Trainer's two groups, the second of norms and biases without weight decay.

    A decay of 0, or a model without norms and biases, gives two groups too, since a checkpoint's
    lists are matched by them.
    """
    from transformers import Trainer

    # a method that does not use `self`
    names_of: Any = Trainer.get_decay_parameter_names
    with_decay = set(names_of(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name in with_decay]},
        {
            "params": [p for name, p in trained if name not in with_decay],
            "weight_decay": 0.0,
        },
    ]


def keep_embeddings_in_32_bits(
    model: nn.Module, native: type[Optimizer], settings: Mapping[str, Any]
) -> None:
    """Let an 8-bit optimizer of bitsandbytes keep the state of embeddings in 32 bits, as Trainer
    and PEFT do.
    """
    if not native.__module__.startswith("bitsandbytes"):
        return
    if settings.get("optim_bits") == 8 or "8bit" in native.__name__:
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
