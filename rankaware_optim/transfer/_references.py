"""References in words: "r=16,alpha=32", "full,fan_in=4096"."""

from __future__ import annotations

from typing import Any

from .._types import Reference
from ..errors import InvalidReferenceError

# What can be written: key, the field of `Reference` that it names, and the type of the value.
_KEYS: dict[str, tuple[str, type]] = {
    "r": ("rank", int),
    "rank": ("rank", int),
    "alpha": ("alpha", float),
    "init": ("init", str),
    "fan_in": ("fan_in", float),
    "batch": ("batch", float),
}
_FLAGS: dict[str, tuple[str, Any]] = {"full": ("method", "full"), "rslora": ("rslora", True)}
_OF_FULL = {"method", "fan_in", "batch"}


def as_reference(value: Reference | str) -> Reference:
    """A reference as it is, or from words."""
    if isinstance(value, str):
        return parse_reference(value)
    if not isinstance(value, Reference):
        raise InvalidReferenceError(
            f"{value!r} is no reference.", 'Give a Reference, or words such as "r=16,alpha=32" or "full".'
        )
    return value


def parse_reference(text: str) -> Reference:
    """A reference from words: "r=16,alpha=32" with rslora, init=B, fan_in=4096, batch=64; or "full,fan_in=4096".

    Raises:
        InvalidReferenceError: a part is unknown, unreadable, given twice, missing, impossible, or not for "full".

    >>> str(parse_reference("r=16,alpha=32"))
    'rank 16, alpha 32, Init[A]'
    """
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, value = _FLAGS.get(part) or _entry(part)
        if name in values:
            raise InvalidReferenceError(f"{part!r} gives {name} a second time in {text!r}.", "Give each part once.")
        values[name] = value
    extra = sorted(values.keys() - _OF_FULL) if "method" in values else []
    if extra:
        raise InvalidReferenceError(
            f"Full finetuning has no {extra[0]}, which {text!r} gives it.",
            'Write "full", with fan_in=4096 or batch=64.',
        )
    return Reference(**values)


def _entry(part: str) -> tuple[str, Any]:
    """The field of `Reference` that "key=value" names, and its value."""
    key, _, value = (piece.strip() for piece in part.partition("="))
    try:
        name, kind = _KEYS[key]
        return name, kind(value)
    except (KeyError, ValueError) as error:
        raise InvalidReferenceError(
            f"{part!r} is no part of a reference.",
            'Write it as "r=16,alpha=32", with rslora, init=B, fan_in=4096, batch=64; or as "full,fan_in=4096".',
        ) from error
