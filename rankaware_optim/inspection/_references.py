"""References from texts ("r=16,alpha=32", "full,fan_in=4096"), adapters on disk, or PEFT's
`LoraConfig`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Protocol

from .._checks import shown
from .._types import Reference, Survey
from ..errors import InvalidReferenceError
from ._inspect_file import inspect_file
from ._survey import declared_init


class LoraConfigLike(Protocol):
    """PEFT's `LoraConfig`, or an object with its fields."""

    @property
    def r(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...


ReferenceLike = Reference | str | os.PathLike[str] | LoraConfigLike

# The keys of a text, with the field of `Reference` and the type of the value.
_KEYS: dict[str, tuple[str, type]] = {
    "r": ("rank", int),
    "rank": ("rank", int),
    "alpha": ("alpha", float),
    "init": ("init", str),
    "fan_in": ("fan_in", float),
    "batch": ("batch", float),
}
_FLAGS: dict[str, tuple[str, Any]] = {
    "full": ("method", "full"),
    "rslora": ("rslora", True),
}
_OF_FULL = {"method", "fan_in", "batch"}


def as_reference(value: ReferenceLike, *, like: Reference | None = None) -> Reference:
    """Return a reference from a value that describes one.

    Args:
        value: a `Reference`, a text such as "r=16,alpha=32", an adapter's folder or file, or PEFT's
            `LoraConfig`. An adapter gives its most common rank, scaling and init, and its width. A
            configuration gives its `r` and `lora_alpha`. Its patterns are ignored.
        like: the reference whose values a text without alpha keeps, except those that it gives.

    Raises:
        InvalidReferenceError: the value describes no reference.
        InspectionError: the adapter cannot be read.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, os.PathLike) or (
        isinstance(value, str) and not _is_words(value) and os.path.exists(value)
    ):
        return reference_of(inspect_file(os.fspath(value)))
    if isinstance(value, str):
        return parse_reference(value, like=like)
    if hasattr(value, "r") and hasattr(value, "lora_alpha"):
        return _of_config(value)
    raise InvalidReferenceError(
        f"{shown(value)} is not a reference.",
        'Give a Reference, a text such as "r=16,alpha=32" or "full", an adapter\'s folder, or a'
        " LoraConfig.",
    )


def reference_of(survey: Survey) -> Reference:
    """Return the most common configuration of an adapter, at its own width."""
    return replace(survey.dominant(), fan_in=survey.width)


def _of_config(config: Any) -> Reference:
    kind = getattr(config, "peft_type", "LORA")
    kind = str(getattr(kind, "value", kind))
    init = declared_init(getattr(config, "init_lora_weights", True), "linear")
    if kind != "LORA" or init == "other":
        what = f"the kind {shown(kind)}"
        if kind == "LORA":
            what = f"init_lora_weights={shown(config.init_lora_weights)}"
        raise InvalidReferenceError(
            f"A {type(config).__name__} with {what} is not a reference, since no law covers it.",
            "Give Reference(rank=..., alpha=...) if you know its equivalent.",
        )
    return Reference(
        config.r, config.lora_alpha, bool(getattr(config, "use_rslora", False))
    )


def _is_words(text: str) -> bool:
    """Return whether every part of `text` begins like a part of a reference. Otherwise it may be a
    path.
    """
    return all(
        part.strip() in _FLAGS or part.partition("=")[0].strip() in _KEYS
        for part in text.split(",")
    )


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
    'rank 16, alpha 32, B = 0'
    >>> str(parse_reference("r=64", like=Reference(rank=16, alpha=32)))
    'rank 64, alpha 32, B = 0'
    """
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, value = _FLAGS.get(part) or _entry(part)
        if name in values:
            raise InvalidReferenceError(
                f"{part!r} gives {name} a second time in {text!r}.",
                "Give each part once.",
            )
        values[name] = value
    extra = sorted(values.keys() - _OF_FULL) if "method" in values else []
    if extra:
        raise InvalidReferenceError(
            f"Full finetuning has no {extra[0]}, which {text!r} gives it.",
            'Write "full", with fan_in=4096 or batch=64.',
        )
    if (
        like is not None
        and like.method == "lora"
        and values
        and not {"alpha", "method"} & values.keys()
    ):
        return replace(like, **values)
    return Reference(**values)


def _entry(part: str) -> tuple[str, Any]:
    """Return the field of `Reference` for "key=value", and its value."""
    key, _, value = map(str.strip, part.partition("="))
    try:
        name, kind = _KEYS[key]
        return name, kind(value)
    except (KeyError, ValueError) as error:
        raise InvalidReferenceError(
            f"{part!r} is not a part of a reference.",
            'Write it as "r=16,alpha=32", or with more, as'
            ' "r=16,alpha=32,rslora,init=B,fan_in=4096,batch=64"; or as "full,fan_in=4096"; or give'
            " an adapter's folder or file.",
        ) from error
