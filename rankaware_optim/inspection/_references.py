"""References in words ("r=16,alpha=32", "full,fan_in=4096"), by an adapter on disk, or by PEFT's `LoraConfig`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Protocol

from .._checks import shown
from .._types import Reference, Survey
from ..errors import InvalidReferenceError
from ._survey import declared_init
from .files import inspect_file


class LoraConfigLike(Protocol):
    """PEFT's `LoraConfig`, or what has its fields."""

    @property
    def r(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...


ReferenceLike = Reference | str | os.PathLike[str] | LoraConfigLike

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


def as_reference(value: ReferenceLike, *, like: Reference | None = None) -> Reference:
    """A reference: as it is, from words, from an adapter's folder or file, or from PEFT's `LoraConfig`.

    An adapter names its most common rank, scaling and init, and its own width; a configuration its `r` and
    `lora_alpha`, whatever its patterns say. Words that name no alpha change `like` alone, where it is given.

    Raises:
        InvalidReferenceError: the value names no reference. InspectionError: the adapter cannot be read.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, os.PathLike) or (isinstance(value, str) and not _is_words(value) and os.path.exists(value)):
        return reference_of(inspect_file(os.fspath(value)))
    if isinstance(value, str):
        return parse_reference(value, like=like)
    if hasattr(value, "r") and hasattr(value, "lora_alpha"):
        return _of_config(value)
    raise InvalidReferenceError(
        f"{shown(value)} is no reference.",
        'Give a Reference, words such as "r=16,alpha=32" or "full", an adapter\'s folder, or a LoraConfig.',
    )


def reference_of(survey: Survey) -> Reference:
    """The most common configuration of an adapter, at its own width."""
    return replace(survey.dominant(), fan_in=survey.width)


def _of_config(config: Any) -> Reference:
    kind = str(getattr(config.peft_type, "value", config.peft_type)) if hasattr(config, "peft_type") else "LORA"
    init = declared_init(getattr(config, "init_lora_weights", True), "linear")
    if kind != "LORA" or init == "other":
        what = f"init_lora_weights={shown(config.init_lora_weights)}" if kind == "LORA" else f"the kind {shown(kind)}"
        raise InvalidReferenceError(
            f"A {type(config).__name__} of {what} is no reference, since no law covers it.",
            "Give Reference(rank=..., alpha=...) if you know what it stands for.",
        )
    return Reference(config.r, config.lora_alpha, bool(getattr(config, "use_rslora", False)))


def _is_words(text: str) -> bool:
    """Whether every part of `text` begins as a part of a reference does; else it may be a path."""
    return all(part.strip() in _FLAGS or part.partition("=")[0].strip() in _KEYS for part in text.split(","))


def parse_reference(text: str, *, like: Reference | None = None) -> Reference:
    """A reference from words: "r=16,alpha=32" with rslora, init=B, fan_in=4096, batch=64; or "full,fan_in=4096".

    like: the reference that words without an alpha change, in what they name alone; left out, alpha is needed.

    Raises:
        InvalidReferenceError: a part is unknown, unreadable, given twice, missing, impossible, or not for "full".

    >>> str(parse_reference("r=16,alpha=32"))
    'rank 16, alpha 32, Init[A]'
    >>> str(parse_reference("r=64", like=Reference(rank=16, alpha=32)))
    'rank 64, alpha 32, Init[A]'
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
    if like is not None and like.method == "lora" and values and not {"alpha", "method"} & values.keys():
        return replace(like, **values)
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
            'Write it as "r=16,alpha=32", with rslora, init=B, fan_in=4096, batch=64; or as "full,fan_in=4096"; '
            "or name an adapter's folder or file.",
        ) from error
