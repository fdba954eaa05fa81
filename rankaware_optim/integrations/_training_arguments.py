"""Optimizer settings in transformers' `TrainingArguments`, and the parameter groups that `Trainer`
makes.

Importing this module does not import transformers. Its functions do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import OptimizerError


def settings_of(
    native: type[Optimizer], args: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the user's settings, completed by those of `args` that `native` accepts. With a
    recipe, without a rate.

    The arguments give the weight decay, which Trainer always passes, and rate, betas and eps if
    they were set. Where they have their default values, the class's own defaults are used. Lion's
    second beta is 0.99, for example, and a default rate is not tuned. With apply_settings, the
    recipe's weight decay is used instead of a default one.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if args is None:
        return settings
    changed = {f.name for f in fields(args) if getattr(args, f.name) != f.default}
    completed = {}
    if "learning_rate" in changed and "recipe" not in settings:
        completed["lr"] = args.learning_rate
    if "weight_decay" in changed or not settings.get("apply_settings"):
        completed["weight_decay"] = args.weight_decay
    if {"adam_beta1", "adam_beta2"} & changed:
        completed["betas"] = (args.adam_beta1, args.adam_beta2)
    if "adam_epsilon" in changed:
        completed["eps"] = args.adam_epsilon
    accepted = {
        name: value for name, value in completed.items() if _takes(native, name, value)
    }
    return {**accepted, **settings}


def _takes(native: type[Optimizer], name: str, value: Any) -> bool:
    """Return whether a class has this setting, and in this form: Adafactor's eps are two."""
    parameters = inspect.signature(native).parameters
    if name not in ("betas", "eps"):
        return name == "lr" or name in parameters
    default = parameters[name].default if name in parameters else None
    if isinstance(value, tuple):
        return isinstance(default, tuple) and len(default) == len(value)
    return isinstance(default, float)


def check_rate(
    caller: str, native: type[Optimizer], args: Any, settings: Mapping[str, Any]
) -> None:
    """Raise if no rate was given, or a model, which the trainer gives."""
    if "model" in settings:
        raise OptimizerError(
            f"{caller} was given model=, but uses that of the trainer.", "Leave it out."
        )
    if {"lr", "recipe"} & settings_of(native, args, settings).keys():
        return
    usual = (
        ""
        if args is None
        else f" to another value than its default, {args.learning_rate:g}"
    )
    raise OptimizerError(
        f"{caller} was given no rate.",
        f"Give lr= with tuned_at=, recipe=, or set learning_rate in the arguments{usual}.",
    )


def trainer_groups(model: nn.Module, native: type[Optimizer]) -> Any:
    """Return Trainer's two groups, the second of norms and biases without weight decay, or the
    model.

    The model is returned if the optimizer has no weight decay, or if all trainable parameters get
    it. A decay of 0 gives two groups too, since checkpoints are matched by their order.
    """
    if "weight_decay" not in inspect.signature(native).parameters:
        return model
    from transformers import Trainer

    names_of: Any = (
        Trainer.get_decay_parameter_names
    )  # a method that does not use `self`
    decayed = set(names_of(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = [p for name, p in trained if name not in decayed]
    if not spared:
        return model
    return [
        {"params": [p for name, p in trained if name in decayed]},
        {"params": spared, "weight_decay": 0.0},
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
