"""References: where a learning rate was tuned, from a string such as
"r=16,alpha=32" or "full,fan_in=4096", from an adapter on disk, or from PEFT's `LoraConfig`.
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


# The types that the values of a string are converted to. `Reference` checks init and method.
_TYPES = {**get_type_hints(Reference), "init": str, "method": str}
_FLAGS = {"full": "method=full", "rslora": "rslora=true"}
_SHORT = {"r": "rank"}
_KEYS = {*_TYPES, *_FLAGS, *_SHORT}
_OF_FULL = {"method", "fan_in", "batch"}

_HOW = (
    'Write it as "r=16,alpha=32", with more parts if needed, as in'
    ' "r=16,alpha=32,rslora,init=B,fan_in=4096,batch=64", or as "full,fan_in=4096". Or pass a'
    " LoraConfig, or the path of an adapter's folder or file on this machine."
)


def as_reference(value: ReferenceLike, *, like: Reference | None = None) -> Reference:
    """Return the reference that a value describes.

    Args:
        value: a `Reference`, a string such as "r=16,alpha=32", the path of an adapter's folder or
            file, or PEFT's `LoraConfig`. An adapter on disk gives its most common rank, scaling and
            init, and as `fan_in` the mean fan-in of its layers. A `LoraConfig` gives its `r`,
            `lora_alpha` and `use_rslora`; its patterns for single layers are ignored.
        like: a reference that completes a string without alpha.

    Raises:
        InvalidReferenceError: the value describes no reference.
        InspectionError: the adapter is missing or cannot be read.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, str):
        parts = value.split(",")
        keys = {part.partition("=")[0].strip() for part in parts}
        # "full" and "r=16" are read as strings, even where a folder has that name.
        if keys <= _KEYS or not os.path.exists(value):
            return parse_reference(value, like=like)
    if isinstance(value, (str, os.PathLike)):
        survey = inspect_file(os.fspath(value))
        for note in survey.notes:  # for example that its scaling is assumed
            warn(note)
        return replace(survey.dominant(), fan_in=survey.width)
    return _of_config(value)


def _of_config(config: Any) -> Reference:
    """Return the reference that PEFT's `LoraConfig` describes.

    Raises:
        InvalidReferenceError: it is not a `LoraConfig`, lacks a rank or an alpha, or makes adapters
            without a law.
    """
    if not (hasattr(config, "r") and hasattr(config, "lora_alpha")):
        raise InvalidReferenceError(f"{shown(config)} is not a reference.", _HOW)
    peft_type = getattr(config, "peft_type", None) or "LORA"
    kind = str(peft_type).rpartition(".")[2]
    init = getattr(config, "init_lora_weights", True)
    if kind != "LORA" or declared_init(init, "linear") == "other":
        raise InvalidReferenceError(
            f"No scaling law covers the adapters of {shown(config)}.",
            "If you know the rank and alpha of an equivalent LoRA adapter, pass"
            " Reference(rank=..., alpha=...).",
        )
    rslora = getattr(config, "use_rslora", None) or False
    return Reference(config.r, config.lora_alpha, rslora)


def parse_reference(text: str, *, like: Reference | None = None) -> Reference:
    """Parse a reference from a string: "r=16,alpha=32", optionally with rslora, init=B,
    fan_in=4096 or batch=64; or "full,fan_in=4096".

    Args:
        text: the string. init is "A" (B starts at zero, as in PEFT, the default) or "B" (A starts
            at zero).
        like: a reference that completes a string without alpha. Without it a string
            for LoRA must have rank and alpha.

    Raises:
        InvalidReferenceError: a part is unknown, unreadable, repeated, missing, impossible, or
            meaningless for full finetuning.

    >>> str(parse_reference("r=16,alpha=32"))
    'rank 16, alpha 32, init A'
    >>> str(parse_reference("r=64", like=Reference(rank=16, alpha=32)))
    'rank 64, alpha 32, init A'
    """
    values = _values_in(text)
    is_full = values.get("method") == "full"
    if is_full and (extra := values.keys() - _OF_FULL):
        raise _unreadable(text, f"full finetuning has no {min(extra)}")
    stands_alone = not {"alpha", "method"}.isdisjoint(values)
    if like is not None and like.method == "lora" and not stands_alone:
        return replace(like, **values)
    if not is_full and (missing := {"rank", "alpha"} - values.keys()):
        raise _unreadable(text, f"it has no {max(missing)}")
    return Reference(**values)


def _values_in(text: str) -> dict[str, Any]:
    """Return the values in a string by the names of `Reference`, in the types that it has."""
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, _, value = map(str.strip, _FLAGS.get(part, part).partition("="))
        name = _SHORT.get(key, key)
        if name in values:
            raise _unreadable(text, f"it has {name} twice")
        try:
            values[name] = msgspec.convert(value, _TYPES[name], strict=False)
        except (KeyError, msgspec.ValidationError):
            raise _unreadable(
                text, f"its part {shown(part)} is unknown or unreadable"
            ) from None
    if not values:
        raise _unreadable(text, "it is empty")
    return values


def _unreadable(text: str, why: str) -> InvalidReferenceError:
    return InvalidReferenceError(f"{shown(text)} is not a reference: {why}.", _HOW)
