"""Settings of `RankAwareOptimizer` from texts, for tools with YAML, flags or environment
variables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .._types import Reference
from ..errors import OptimizerError
from ..inspection import as_reference


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


def _reference(text: Any) -> Reference:
    return text if isinstance(text, Reference) else as_reference(str(text))


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
