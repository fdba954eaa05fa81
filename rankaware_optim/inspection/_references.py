"""This module reads a `Reference`, the configuration with which a learning rate was
tuned.

A reference can be read from a string such as "r=16,alpha=32" or "full,fan_in=4096",
from an adapter on disk, or from PEFT's `LoraConfig`.
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
    """PEFT's `LoraConfig`, or any object with the attributes `r` and `lora_alpha`."""

    @property
    def r(self) -> int: ...


ReferenceLike = Reference | str | os.PathLike[str] | LoraConfigLike


# The values in a string are converted to these types. The init and the method stay
# strings here, because `Reference` checks them itself.
_TYPES = {**get_type_hints(Reference), "init": str, "method": str}
_FLAGS = {"full": "method=full", "rslora": "rslora=true"}
_SHORT = {"r": "rank"}
_KEYS = {*_TYPES, *_FLAGS, *_SHORT}
_OF_FULL = {"method", "fan_in", "batch"}

_HOW = (
    'Pass a string such as "r=16,alpha=32" or'
    ' "r=16,alpha=32,rslora,init=B,fan_in=4096,batch=64", or "full,fan_in=4096" for full'
    " finetuning. A LoraConfig or the path of an adapter's folder or file can be passed too."
)


def as_reference(value: ReferenceLike, *, like: Reference | None = None) -> Reference:
    """Convert a string, a path or a `LoraConfig` to a `Reference`.

    Args:
        value: a `Reference`, a string such as "r=16,alpha=32", the path of an adapter's
            folder or file, or PEFT's `LoraConfig`. From an adapter on disk, the most
            common rank, scaling and init are read, and `fan_in` is the mean fan-in of
            its layers. From a `LoraConfig`, `r`, `lora_alpha` and `use_rslora` are
            read. Its `rank_pattern` and `alpha_pattern` are ignored.
        like: a reference that provides the missing values if the string has no alpha.

    Raises:
        InvalidReferenceError: the value cannot be converted to a reference.
        InspectionError: the adapter does not exist or cannot be read.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, str):
        parts = value.split(",")
        keys = {part.partition("=")[0].strip() for part in parts}
        # "full" and "r=16" are never read as paths, even if a folder has that name.
        if keys <= _KEYS or not os.path.exists(value):
            return parse_reference(value, like=like)
    if isinstance(value, (str, os.PathLike)):
        survey = inspect_file(os.fspath(value))
        # A `Reference` has no notes, so notes become warnings. For example, a note
        # states that the scaling was assumed.
        for note in survey.notes:
            warn(note)
        return replace(survey.dominant(), fan_in=survey.width)
    return _of_config(value)


def _of_config(config: Any) -> Reference:
    """Convert PEFT's `LoraConfig` to a `Reference`.

    Raises:
        InvalidReferenceError: the value is not a `LoraConfig`, or no scaling law covers
            its adapters.
    """
    if not (hasattr(config, "r") and hasattr(config, "lora_alpha")):
        value = shown(config)
        raise InvalidReferenceError(
            f"{value} does not describe a configuration, such as a rank and alpha.",
            _HOW,
        )
    peft_type = getattr(config, "peft_type", None) or "LORA"
    kind = str(peft_type).rpartition(".")[2]
    init = getattr(config, "init_lora_weights", True)
    if kind != "LORA" or declared_init(init, "linear") == "other":
        value = shown(config)
        raise InvalidReferenceError(
            f"No scaling law covers the adapters that {value} creates, so a learning rate that was"
            " tuned with them cannot be converted.",
            "If you know the rank and alpha of a comparable LoRA adapter, pass"
            " Reference(rank=..., alpha=...).",
        )
    rslora = getattr(config, "use_rslora", None) or False
    return Reference(config.r, config.lora_alpha, rslora)


def parse_reference(text: str, *, like: Reference | None = None) -> Reference:
    """Parse a string such as "r=16,alpha=32" or "full,fan_in=4096" to a `Reference`.

    If the string describes LoRA, it may also contain options such as rslora, init=B,
    fan_in=4096 and batch=64.

    Args:
        text: the string. Its init is "A" (B starts at zero, as in PEFT, the default) or
            "B" (A starts at zero).
        like: a reference that provides the missing values if the string has no alpha.
            If it is not passed, a string for LoRA must contain the rank and alpha.

    Raises:
        InvalidReferenceError: a value is unknown, unreadable, repeated, missing or out
            of range, or it cannot be used for full finetuning.

    >>> str(parse_reference("r=16,alpha=32"))
    'rank 16, alpha 32, init A'
    >>> str(parse_reference("r=64", like=Reference(rank=16, alpha=32)))
    'rank 64, alpha 32, init A'
    """
    configuration = shown(text)
    values = _values_in(text)
    is_full = values.get("method") == "full"
    if is_full and (extra := values.keys() - _OF_FULL):
        setting = min(extra)
        raise InvalidReferenceError(
            f"The configuration {configuration} contains {setting}, but full finetuning has no"
            f" {setting}.",
            f"Remove {setting}. {_HOW}",
        )
    stands_alone = not {"alpha", "method"}.isdisjoint(values)
    if like is not None and like.method == "lora" and not stands_alone:
        return replace(like, **values)
    if not is_full and (missing := {"rank", "alpha"} - values.keys()):
        setting = max(missing)
        raise InvalidReferenceError(
            f"The configuration {configuration} contains no {setting}.",
            f"Add {setting}. {_HOW}",
        )
    return Reference(**values)


def _values_in(text: str) -> dict[str, Any]:
    """Return the values in a string, converted to the types of the arguments of
    `Reference`.

    The keys are the argument names of `Reference`.
    """
    configuration = shown(text)
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, _, value = map(str.strip, _FLAGS.get(part, part).partition("="))
        name = _SHORT.get(key, key)
        entry = shown(part)
        if name in values:
            raise InvalidReferenceError(
                f"The configuration {configuration} contains {name} twice.",
                f"Remove one of the two. {_HOW}",
            )
        try:
            values[name] = msgspec.convert(value, _TYPES[name], strict=False)
        except KeyError:
            raise InvalidReferenceError(
                f"The configuration {configuration} contains {entry}, which is not a known"
                " setting.",
                f"Remove or correct {entry}. {_HOW}",
            ) from None
        except msgspec.ValidationError:
            raise InvalidReferenceError(
                f"In the configuration {configuration}, the value of {entry} has the wrong type.",
                f"Correct {entry}. {_HOW}",
            ) from None
    if not values:
        raise InvalidReferenceError(
            f"The configuration {configuration} is empty.", _HOW
        )
    return values
