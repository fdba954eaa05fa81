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
from ..errors import InspectionError, InvalidReferenceError
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

# A part in words, its key and its value.
_Entry = tuple[str, str, Any]


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
    if isinstance(value, str) and not _is_path(value):
        return parse_reference(value, like=like)
    if isinstance(value, (str, os.PathLike)):
        if not os.path.exists(value):
            raise InspectionError(
                f"There is no folder or file {os.fspath(value)}.",
                "Give the folder of an adapter on this machine (download one from the Hub first),"
                ' or a text such as "r=16,alpha=32".',
            )
        survey = inspect_file(os.fspath(value))
        return replace(survey.dominant(), fan_in=survey.width)
    given = _config(value).items()
    entries = [(f"{key}={own}", key, own) for key, own in given if own is not None]
    return _from_entries(entries, value, like)


def _config(value: Any) -> Mapping[str, Any]:
    """Return a dict, or the entries of PEFT's `LoraConfig` as one. What else PEFT's configuration
    has is left out.
    """
    config: Mapping[str, Any] = value
    if not isinstance(value, Mapping):
        config = {key: getattr(value, key) for key in _OF_PEFT if hasattr(value, key)}
        if not {"r", "lora_alpha"} <= config.keys():
            raise InvalidReferenceError(
                f"{shown(value)} is not a reference.",
                'Give a Reference, a text such as "r=16,alpha=32" or "full", a dict such as {"r":'
                ' 16, "lora_alpha": 32}, an adapter\'s folder, or a LoraConfig.',
            )
    if "lora_alpha" not in config:
        return config
    _refuse_lawless(config, type(value).__name__)
    return {key: config[key] for key in config if key in _KEYS}


def _refuse_lawless(config: Mapping[str, Any], owner: str) -> None:
    """Raise if no law covers the adapters of PEFT's configuration, an `owner`."""
    kind = config.get("peft_type") or "LORA"
    kind = str(getattr(kind, "value", kind))
    init = config.get("init_lora_weights", True)
    if kind == "LORA" and declared_init(init, "linear") != "other":
        return
    what = f"the kind {shown(kind)}"
    if kind == "LORA":
        what = f"init_lora_weights={shown(init)}"
    raise InvalidReferenceError(
        f"A {owner} with {what} is not a reference, since no law covers it.",
        "Give Reference(rank=..., alpha=...) if you know its equivalent.",
    )


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
    'rank 16, alpha 32, B = 0'
    >>> str(parse_reference("r=64", like=Reference(rank=16, alpha=32)))
    'rank 64, alpha 32, B = 0'
    """
    entries: list[_Entry] = []
    for part in filter(None, map(str.strip, text.split(","))):
        key, equals, value = map(str.strip, part.partition("="))
        entries.append((part, key, value if equals else _FLAGS.get(key, "")))
    return _from_entries(entries, text, like)


def _from_entries(
    entries: Iterable[_Entry], whole: object, like: Reference | None
) -> Reference:
    """Return the reference with these entries. `whole` is what they were read from."""
    values: dict[str, Any] = {}
    for part, key, value in entries:
        name, read_value = _field(part, key, value)
        if name in values:
            raise InvalidReferenceError(
                f"{part!r} gives {name} a second time in {shown(whole)}.",
                "Give each part once.",
            )
        values[name] = read_value
    extra = sorted(values.keys() - _OF_FULL) if values.get("method") == "full" else []
    if extra:
        raise InvalidReferenceError(
            f"Full finetuning has no {extra[0]}, which {shown(whole)} gives it.",
            'Write "full", with fan_in=4096 or batch=64.',
        )
    own = not values or {"alpha", "method"} & values.keys()
    if like is None or like.method == "full" or own:
        return Reference(**values)
    return replace(like, **values)


def _field(part: str, key: str, value: Any) -> tuple[str, Any]:
    """Return the field of `Reference` for an entry, and its value."""
    try:
        name, read = _KEYS[key]
        return name, read(value) if isinstance(value, str) else value
    except (KeyError, ValueError) as error:
        nor = "" if "=" in part else ", and there is no folder of that name"
        raise InvalidReferenceError(
            f"{part!r} is not a part of a reference{nor}.",
            'Write it as "r=16,alpha=32", or with more, as'
            ' "r=16,alpha=32,rslora,init=B,fan_in=4096,batch=64"; or as "full,fan_in=4096"; or give'
            " an adapter's folder or file.",
        ) from error
