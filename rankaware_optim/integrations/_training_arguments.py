"""What transformers' `TrainingArguments` say of an optimizer, and the groups that `Trainer` makes for one.

Importing this module imports no transformers: its functions do.
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
    """What is given, and where it is not, what `args` say and `native` takes; no rate of theirs beside a recipe."""
    said = {} if args is None else _said(args, native)
    given = {name: value for name, value in given.items() if value is not None}
    if "recipe" in given:
        said.pop("lr", None)
    return {**said, **given}


def refuse_no_rate(who: str, settings: Mapping[str, Any]) -> None:
    if "lr" not in settings and "recipe" not in settings:
        raise OptimizerError(
            f"{who} was given no rate.", "Give lr= with tuned_at=, recipe=, or set learning_rate in the arguments."
        )


def _said(args: Any, native: type[Optimizer]) -> dict[str, Any]:
    """The weight decay of `args`, which Trainer passes always, and the rate, betas and eps where they were set.

    At their defaults these leave the class its own: Lion's second beta is 0.99, and a default rate was tuned nowhere.
    """
    own = {field.name: field.default for field in fields(args)}
    changed = {name: getattr(args, name) for name, default in own.items() if getattr(args, name) != default}
    takes = inspect.signature(native).parameters
    found: dict[str, Any] = {"weight_decay": args.weight_decay} if "weight_decay" in takes else {}
    if "learning_rate" in changed:
        found["lr"] = args.learning_rate
    if {"adam_beta1", "adam_beta2"} & changed.keys() and len(_default(takes, "betas", ())) == 2:
        found["betas"] = (args.adam_beta1, args.adam_beta2)
    if "adam_epsilon" in changed and isinstance(_default(takes, "eps", None), float):
        found["eps"] = args.adam_epsilon
    return found


def _default(takes: Mapping[str, inspect.Parameter], name: str, otherwise: Any) -> Any:
    """The default of a constructor's argument, where it has one of the kind that is looked for."""
    found = takes[name].default if name in takes else otherwise
    return found if isinstance(found, (tuple, float)) else otherwise


def trainer_groups(model: nn.Module, native: type[Optimizer], settings: Mapping[str, Any]) -> Any:
    """Trainer's own two groups, the second of norms and biases, which no weight decay shrinks; else the model.

    The model stands for all its trainable parameters, where the optimizer has no weight decay or all of them take it.
    """
    takes = inspect.signature(native).parameters
    if not settings.get("weight_decay", _default(takes, "weight_decay", 0.0)):
        return model
    from transformers import Trainer

    names_of: Any = Trainer.get_decay_parameter_names  # a method that does not use its trainer
    decayed = set(names_of(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = [p for name, p in trained if name not in decayed]
    if not spared:
        return model
    return [{"params": [p for name, p in trained if name in decayed]}, {"params": spared, "weight_decay": 0.0}]


def keep_embeddings_in_32_bits(model: nn.Module, native: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """Let an 8-bit optimizer of bitsandbytes keep the state of embeddings in 32 bits, as Trainer and PEFT do."""
    if not native.__module__.startswith("bitsandbytes"):
        return
    if settings.get("optim_bits") == 8 or "8bit" in native.__name__:
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
