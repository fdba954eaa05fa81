"""References from texts ("r=16,alpha=32", "full,fan_in=4096"), adapters on disk, or PEFT's
`LoraConfig`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Protocol, get_type_hints

import msgspec

from .._checks import shown
from .._types import Reference
from .._warn import warn
from ..errors import InvalidReferenceError
from ._adapter_file import inspect_file
from ._survey import declared_init


class LoraConfigLike(Protocol):
    """PEFT's `LoraConfig`, or an object with its `r`, `lora_alpha` and `use_rslora`."""

    @property
    def r(self) -> int: ...


ReferenceLike = Reference | str | os.PathLike[str] | LoraConfigLike


# What reads the values of a text, by the field of `Reference`, which checks the texts.
_TYPES = {**get_type_hints(Reference), "init": str, "method": str}
_FLAGS = {"full": "method=full", "rslora": "rslora=true"}
_SHORT = {"r": "rank"}
_KEYS = {*_TYPES, *_FLAGS, *_SHORT}
_OF_FULL = {"method", "fan_in", "batch"}

_HOW = (
    'Write it as "r=16,alpha=32", or with more, as'
    ' "r=16,alpha=32,rslora,init=B,fan_in=4096,batch=64"; or as "full,fan_in=4096"; or give a'
    " LoraConfig, or an adapter's folder or file on this machine."
)


def as_reference(value: ReferenceLike, *, like: Reference | None = None) -> Reference:
    """Return a reference from a value that describes one.

    Args:
        value: a `Reference`, a text such as "r=16,alpha=32", an adapter's folder or file, or PEFT's
            `LoraConfig`. An adapter gives its most common rank, scaling and init, and its width. A
            configuration gives its `r`, `lora_alpha` and `use_rslora`. Its patterns are ignored.
        like: the reference whose values a text without alpha keeps, except those that it gives.

    Raises:
        InvalidReferenceError: the value describes no reference.
        InspectionError: the adapter is missing or cannot be read.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, str):
        parts = value.split(",")
        keys = {part.partition("=")[0].strip() for part in parts}
        # a folder may be called "full"
        if keys <= _KEYS or not os.path.exists(value):
            return parse_reference(value, like=like)
    if isinstance(value, (str, os.PathLike)):
        survey = inspect_file(os.fspath(value))
        for note in survey.notes:  # its scaling may be assumed
            warn(note)
        return replace(survey.dominant(), fan_in=survey.width)
    return _of_config(value)


def _of_config(config: Any) -> Reference:
    """Return the reference of PEFT's `LoraConfig`.

    Raises:
        InvalidReferenceError: it is none, or no law covers its adapters.
    """
    peft_type = getattr(config, "peft_type", None) or "LORA"
    kind = str(peft_type).rpartition(".")[2]
    init = getattr(config, "init_lora_weights", True)
    is_config = hasattr(config, "r") and hasattr(config, "lora_alpha")
    if not is_config or kind != "LORA" or declared_init(init, "linear") == "other":
        raise InvalidReferenceError(
            f"{shown(config)} is not a reference, or no law covers its adapters.",
            "Give Reference(rank=..., alpha=...) if you know its equivalent. " + _HOW,
        )
    rslora = bool(getattr(config, "use_rslora", False))
    return Reference(config.r, config.lora_alpha, rslora)


def parse_reference(text: str, *, like: Reference | None = None) -> Reference:
    """Parse a reference: "r=16,alpha=32" with optional rslora, init=B, fan_in=4096, batch=64; or
    "full,fan_in=4096".

    Args:
        text: the reference as text. init is "A" (B starts at zero, as in PEFT, the default) or "B"
            (A starts at zero).
        like: the reference whose values a text without alpha keeps, except those that it gives.
            Without it alpha is required.

    Raises:
        InvalidReferenceError: a part is unknown, unreadable, given twice, missing, impossible, or
            not for "full".

    >>> str(parse_reference("r=16,alpha=32"))
    'rank 16, alpha 32, init A'
    >>> str(parse_reference("r=64", like=Reference(rank=16, alpha=32)))
    'rank 64, alpha 32, init A'
    """
    values: dict[str, Any] = {}
    why = ""
    for part in filter(None, map(str.strip, text.split(","))):
        pair = _FLAGS.get(part, part)
        key, _, given = map(str.strip, pair.partition("="))
        name = _SHORT.get(key, key)
        if name in values:
            why = f"it gives {name} twice"
        try:
            values[name] = msgspec.convert(given, _TYPES[name], strict=False)
        except (KeyError, msgspec.ValidationError):
            why = f"{shown(part)} is no part of one"
    extra = values.keys() - _OF_FULL
    if values.get("method") == "full" and extra:
        why = f"full finetuning has no {min(extra)}"
    if why:
        raise InvalidReferenceError(f"{shown(text)} is not a reference: {why}.", _HOW)
    stands_alone = {"alpha", "method"} & values.keys()
    if stands_alone or like is None or like.method == "full":
        return Reference(**values)
    return replace(like, **values)
