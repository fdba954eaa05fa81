"""Settings of `RankAwareOptimizer` from texts, for tools with YAML, flags or environment variables.
And from transformers' `TrainingArguments`, with the parameter groups that `Trainer` makes.

Importing this module does not import transformers. Its functions do.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._types import Reference
from ..errors import OptimizerError
from ..inspection import as_reference

# --- texts ----------------------------------------------------------------------------------------


def _flag(text: Any) -> bool:
    """Return a bool from a bool or a word.

    >>> _flag("true"), _flag("0")
    (True, False)
    """
    word = str(text).lower()
    if word not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError(f"{text!r} is neither true nor false")
    return word in ("true", "1", "yes")


def _one_of(*words: str) -> Callable[[Any], str]:
    def read(text: Any) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return str(text)

    return read


def _reference(value: Any) -> Reference:
    is_read = isinstance(value, (Reference, Mapping))
    return as_reference(value if is_read else str(value))


def _rates(text: Any) -> dict[str, float]:
    """Return rates by name pattern, from a mapping or JSON.

    >>> _rates('{"*head*": 1e-3}')
    {'*head*': 0.001}
    """
    rates = json.loads(text) if isinstance(text, str) else text
    return {str(pattern): float(rate) for pattern, rate in dict(rates).items()}


# The settings, and the functions that read their texts.
_READERS: dict[str, Callable[[Any], Any]] = {
    "tuned_at": _reference,
    "recipe": str,
    "law": str,
    "method": _one_of("lora", "full"),
    "init": _one_of("A", "B"),
    "rates": _rates,
    "other_lr": float,
    "per_layer_width": _flag,
    "batch": float,
    "strict": _flag,
    "scale_weight_decay": _flag,
    "on_rank_change": _one_of("raise", "reset"),
}


def settings_from_words(
    words: Mapping[str, Any], prefix: str = "", lr: float | None = None
) -> dict[str, Any]:
    """Return keyword arguments of `RankAwareOptimizer` from their texts.

    Args:
        words: the texts by name. None stands for a setting that is not given.
        prefix: the beginning of the names. Others are not read.
        lr: the tool's own rate. A recipe's replaces it.

    Raises:
        OptimizerError: a name is unknown, a value cannot be read, or both a recipe and a reference
            are given.

    >>> settings_from_words({"tuned_at": "r=16,alpha=32", "strict": "true"})["tuned_at"].scaling
    2.0
    """
    given = {
        name.removeprefix(prefix).lower(): text
        for name, text in words.items()
        if name.startswith(prefix) and text is not None
    }
    unknown = given.keys() - _READERS.keys()
    if unknown:
        raise OptimizerError(
            f"{min(unknown)!r} is not a setting.", f"Known are {', '.join(_READERS)}."
        )
    if {"recipe", "tuned_at"} <= given.keys():
        raise OptimizerError(
            "Both recipe and tuned_at were given.",
            "Give only the recipe, which has a reference.",
        )
    settings = {} if lr is None or "recipe" in given else {"lr": lr}
    for name, text in given.items():
        try:
            settings[name] = _READERS[name](text)
        except (TypeError, ValueError) as error:
            raise OptimizerError(
                f"{name} is {text!r}: {str(error).rstrip('.')}.",
                "Correct it in the settings.",
            ) from error
    return settings


# --- a trainer's arguments ------------------------------------------------------------------------


def settings_of(
    native: type[Optimizer], args: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the user's settings, completed by those of `args` that `native` accepts. With a
    recipe, without a rate.

    The arguments give the rate and the weight decay, which Trainer always passes, and betas and eps
    if they were set. Where they have their default values, the class's own defaults are used.
    Lion's second beta is 0.99, for example. With apply_settings, the recipe's weight decay is used
    instead of a default one.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if args is None:
        return settings
    changed = _changed(args)
    if not settings.get("apply_settings"):
        changed.add("weight_decay")
    for name, value, sources in (
        ("weight_decay", args.weight_decay, {"weight_decay"}),
        ("betas", (args.adam_beta1, args.adam_beta2), {"adam_beta1", "adam_beta2"}),
        ("eps", args.adam_epsilon, {"adam_epsilon"}),
    ):
        if changed & sources and _takes(native, name, value):
            settings.setdefault(name, value)
    if "recipe" not in settings:
        # also a default one, which a search may try
        settings.setdefault("lr", args.learning_rate)
    return settings


def _changed(args: Any) -> set[str]:
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


def check_rate(caller: str, args: Any, settings: Mapping[str, Any]) -> None:
    """Raise if no rate was given, or a model, which the trainer gives. A default rate of the
    arguments is not tuned, unless tuned_at says that it is.
    """
    if "model" in settings:
        raise OptimizerError(
            f"{caller} was given model=, but uses that of the trainer.", "Leave it out."
        )
    if any(settings.get(name) is not None for name in ("lr", "recipe", "tuned_at")):
        return
    usual = ""
    if args is not None:
        if "learning_rate" in _changed(args):
            return
        usual = (
            f" to another value than its default, {args.learning_rate:g}, or say by tuned_at= that"
            " the default is tuned"
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

    # a method that does not use `self`
    names_of: Any = Trainer.get_decay_parameter_names
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
