"""Settings of `RankAwareOptimizer` from texts, for tools with YAML, flags or environment variables."""

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


def _reference(words: Any) -> Reference:
    return words if isinstance(words, Reference) else as_reference(str(words))


def _rates(words: Any) -> dict[str, float]:
    """Return rates by name pattern, from a mapping or JSON.

    >>> _rates('{"*head*": 1e-3}')
    {'*head*': 0.001}
    """
    found = json.loads(words) if isinstance(words, str) else words
    return {str(pattern): float(rate) for pattern, rate in dict(found).items()}


# The settings, and the functions that read their texts.
_READERS: dict[str, Callable[[Any], Any]] = {
    "tuned_at": _reference,
    "recipe": str,
    "law": str,
    "method": str,
    "init": str,
    "rates": _rates,
    "other_lr": float,
    "per_layer_width": _flag,
    "batch": float,
    "strict": _flag,
    "scale_weight_decay": _flag,
    "on_rank_change": str,
}


def settings_from_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `RankAwareOptimizer` from their texts.

    >>> settings_from_words({"tuned_at": "r=16,alpha=32", "strict": "true"})["tuned_at"].scaling
    2.0

    Raises:
        OptimizerError: a name is unknown, a value cannot be read, or both a recipe and a reference
            are given.
    """
    unknown = words.keys() - _READERS.keys()
    if unknown:
        raise OptimizerError(
            f"{min(unknown)!r} is not a setting.", f"Known are {', '.join(_READERS)}."
        )
    if {"recipe", "tuned_at"} <= words.keys():
        raise OptimizerError(
            "Both recipe and tuned_at were given.", "Give only the recipe, which has a reference."
        )
    made = {}
    for name, text in words.items():
        try:
            made[name] = _READERS[name](text)
        except (TypeError, ValueError) as error:
            raise OptimizerError(
                f"{name} is {text!r}: {str(error).rstrip('.')}.", "Correct it in the settings."
            ) from error
    return made
