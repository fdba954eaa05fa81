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


def settings_of(native: type[Optimizer], args: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings, completed by those of `args` that `native` accepts. With a recipe,
    without a rate.

    The arguments give the weight decay, which Trainer always passes, and rate, betas and eps if
    they were set. Where they have their default values, the class's own defaults are used. Lion's
    second beta is 0.99, for example, and a default rate is not tuned. With apply_settings, the
    recipe's weight decay is used instead of a default one.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if args is None:
        return given
    changed = {f.name for f in fields(args) if getattr(args, f.name) != f.default}
    takes = inspect.signature(native).parameters
    found: dict[str, Any] = {}
    if "weight_decay" in takes and ("weight_decay" in changed or not given.get("apply_settings")):
        found["weight_decay"] = args.weight_decay
    if "learning_rate" in changed and "recipe" not in given:
        found["lr"] = args.learning_rate
    if {"adam_beta1", "adam_beta2"} & changed and len(_default(takes, "betas", ())) == 2:
        found["betas"] = (args.adam_beta1, args.adam_beta2)
    if "adam_epsilon" in changed and isinstance(_default(takes, "eps", None), float):
        found["eps"] = args.adam_epsilon
    return {**found, **given}


def check_given(who: str, native: type[Optimizer], args: Any, given: Mapping[str, Any]) -> None:
    """Raise if a model was given, which the trainer gives, or no rate."""
    if "model" in given:
        raise OptimizerError(
            f"{who} was given model=, but uses that of the trainer.", "Leave it out."
        )
    settings = settings_of(native, args, given)
    if "lr" not in settings and "recipe" not in settings:
        usual = (
            "" if args is None else f" to another value than its default, {args.learning_rate:g}"
        )
        raise OptimizerError(
            f"{who} was given no rate.",
            f"Give lr= with tuned_at=, recipe=, or set learning_rate in the arguments{usual}.",
        )


def _default(takes: Mapping[str, inspect.Parameter], name: str, otherwise: Any) -> Any:
    """Return the default of a constructor's argument if it has the expected type, else `otherwise`."""
    found = takes[name].default if name in takes else otherwise
    return found if isinstance(found, (tuple, float)) else otherwise


def trainer_groups(model: nn.Module, native: type[Optimizer]) -> Any:
    """Return Trainer's two groups, the second of norms and biases without weight decay, or the
    model.

    The model is returned if the optimizer has no weight decay, or if all trainable parameters get
    it. A decay of 0 gives two groups too, since checkpoints are matched by their order.
    """
    if "weight_decay" not in inspect.signature(native).parameters:
        return model
    from transformers import Trainer

    names_of: Any = Trainer.get_decay_parameter_names  # a method that does not use `self`
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
