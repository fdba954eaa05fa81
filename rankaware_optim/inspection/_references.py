"""References from texts ("r=16,alpha=32", "full,fan_in=4096"), dicts, adapters on disk, or PEFT's
`LoraConfig`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from .._checks import shown
from .._types import Reference
from ..errors import InvalidReferenceError
from ._inspect_file import inspect_file
from ._survey import declared_init


class LoraConfigLike(Protocol):
    """PEFT's `LoraConfig`, or an object with its fields."""

    @property
    def r(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...


ReferenceLike = Reference | str | os.PathLike[str] | Mapping[str, Any] | LoraConfigLike


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# The keys of a text or a dict, with the field of `Reference` and what reads a value's text.
_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "r": ("rank", int),
    "rank": ("rank", int),
    "alpha": ("alpha", float),
    "lora_alpha": ("alpha", float),
    "rslora": ("rslora", _truth),
    "use_rslora": ("rslora", _truth),
    "init": ("init", str),
    "fan_in": ("fan_in", float),
    "batch": ("batch", float),
    "method": ("method", str),
    "full": ("method", {"true": "full"}.__getitem__),
}
_FLAGS = {"full": "true", "rslora": "true"}  # parts of a text without a value
_OF_FULL = {"method", "fan_in", "batch"}
_OF_PEFT = ("r", "lora_alpha", "use_rslora", "init_lora_weights", "peft_type")

_HOW = (
    'Write it as "r=16,alpha=32", or with more, as'
    ' "r=16,alpha=32,rslora,init=B,fan_in=4096,batch=64"; or as "full,fan_in=4096"; or give a'
    " LoraConfig, or an adapter's folder or file on this machine."
)


def as_reference(value: ReferenceLike, *, like: Reference | None = None) -> Reference:
    """Return a reference from a value that describes one.

    Args:
        value: a `Reference`, a text such as "r=16,alpha=32" or a dict such as {"r": 16,
            "lora_alpha": 32}, in our names or PEFT's, an adapter's folder or file, or PEFT's
            `LoraConfig`. An adapter gives its most common rank, scaling and init, and its width. A
            configuration gives its `r`, `lora_alpha` and `use_rslora`. Its patterns are ignored, as
            is all else in a dict with `lora_alpha`.
        like: the reference whose values a text or dict without alpha keeps, except those that it
            gives.

    Raises:
        InvalidReferenceError: the value describes no reference.
        InspectionError: the adapter is missing or cannot be read.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, os.PathLike) or (isinstance(value, str) and _is_path(value)):
        survey = inspect_file(os.fspath(value))
        return replace(survey.dominant(), fan_in=survey.width)
    if isinstance(value, str):
        return parse_reference(value, like=like)
    given = _config(value).items()
    return _from_entries([(k, own) for k, own in given if own is not None], value, like)


def _config(value: Any) -> Mapping[str, Any]:
    """Return a dict, or PEFT's `LoraConfig` as one. What else PEFT's configuration has is left out.

    Raises:
        InvalidReferenceError: it is neither, or no law covers its adapters.
    """
    config: Mapping[str, Any] = value
    if not isinstance(value, Mapping):
        config = {key: getattr(value, key) for key in _OF_PEFT if hasattr(value, key)}
    elif "lora_alpha" not in config:
        return config
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    init = config.get("init_lora_weights", True)
    has_law = kind == "LORA" and declared_init(init, "linear") != "other"
    if "lora_alpha" not in config or not has_law:
        raise InvalidReferenceError(
            f"{shown(value)} is not a reference, or no law covers its adapters.",
            "Give Reference(rank=..., alpha=...) if you know its equivalent. " + _HOW,
        )
    return {key: config[key] for key in _KEYS.keys() & config.keys()}


def _is_path(text: str) -> bool:
    """Return whether `text` names a folder or file: one that is there, or by its form. If every
    part begins like a part of a reference, it does not.
    """
    if all(part.partition("=")[0].strip() in _KEYS for part in text.split(",")):
        return False
    of_path = os.path.dirname(text) or text.endswith(".safetensors")
    return bool(of_path) or os.path.exists(text)


def parse_reference(text: str, *, like: Reference | None = None) -> Reference:
    """Parse a reference: "r=16,alpha=32" with optional rslora, init=B, fan_in=4096, batch=64; or
    "full,fan_in=4096". PEFT's names lora_alpha=32 and use_rslora=True are read too.

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
    entries = []
    for part in filter(None, map(str.strip, text.split(","))):
        key, equals, value = map(str.strip, part.partition("="))
        entries.append((key, value if equals else _FLAGS.get(key, "")))
    return _from_entries(entries, text, like)


def _from_entries(
    entries: Iterable[tuple[str, Any]], whole: object, like: Reference | None
) -> Reference:
    """Return the reference with these entries. `whole` is what they were read from."""
    values: dict[str, Any] = {}
    why = ""
    for key, text in entries:
        try:
            name, read = _KEYS[key]
            value = read(text) if isinstance(text, str) else text
        except (KeyError, ValueError):
            name, value = key, text
            why = f"{shown(key)} cannot be {shown(text)} there"
        if name in values:
            why = f"it gives {name} twice"
        values[name] = value
    extra = values.keys() - _OF_FULL
    if values.get("method") == "full" and extra:
        why = f"full finetuning has no {min(extra)}"
    if why:
        raise InvalidReferenceError(f"{shown(whole)} is not a reference: {why}.", _HOW)
    return _changed(like, values)


def _changed(like: Reference | None, values: Mapping[str, Any]) -> Reference:
    stands_alone = not values or {"alpha", "method"} & values.keys()
    if stands_alone or like is None or like.method == "full":
        return Reference(**values)
    return replace(like, **values)
