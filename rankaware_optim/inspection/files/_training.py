"""How an adapter was trained, from its file's metadata. kohya's scripts write rates, optimizer and
steps into it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..._types import Survey
from ...errors import InspectionError
from ._inspect_file import adapter_file, inspect_file
from ._safetensors import read_header, shown

_PARTS = (("UNet", "ss_unet_lr", "lora_unet"), ("text encoder", "ss_text_encoder_lr", "lora_te"))


class PartRate(NamedTuple):
    """The base rate of a part of the model, per step, and the part's survey. part: "" for the whole
    model.
    """

    part: str
    lr: float
    survey: Survey


@dataclass(frozen=True)
class Training:
    """An adapter's training, from its file: rates, the optimizer's class and settings, number of
    steps.
    """

    rates: tuple[PartRate, ...]
    optimizer: str = ""
    settings: Mapping[str, Any] | None = None
    steps: int | None = None

    @property
    def optimizer_class(self) -> type:
        """An empty class with the optimizer's name, from which its family follows."""
        package, _, name = self.optimizer.rpartition(".")
        return type(name, (), {"__module__": package})


def read_training(path: str | Path) -> Training:
    """Return how the adapter at `path` was trained, from kohya's metadata.

    A part's rate is ss_unet_lr or ss_text_encoder_lr, by default ss_learning_rate. Several text
    encoders are separate parts.

    Raises:
        InspectionError: the file has no rate, or an impossible one; or as for `inspect_file`.
    """
    survey, file = inspect_file(path), adapter_file(path)
    said = read_header(file).metadata
    rates = tuple(_rates(file, survey, said))
    if not rates:
        raise InspectionError(
            f"{file} has no learning rate: there is no ss_learning_rate in its metadata.",
            "Give the rate yourself, before --from in a shell.",
        )
    name, _, arguments = said.get("ss_optimizer", "").partition("(")
    steps = said.get("ss_max_train_steps", "")
    whole = int(steps) if steps.isdecimal() and len(steps) < 16 else None
    return Training(rates, name if _is_dotted(name) else "", _settings(arguments), whole or None)


def _rates(file: Path, survey: Survey, said: Mapping[str, str]) -> Iterator[PartRate]:
    """Yield the rates of the parts in the file, or one rate for all if no part has its own."""
    common = _numbers(file, "ss_learning_rate", said)
    own = {key: _numbers(file, key, said) for _, key, _ in _PARTS}
    for part, key, prefix in _PARTS if any(own.values()) else (("", "", ""),):
        rates = own.get(key) or common[:1]
        for number, lr in enumerate(rates, 1):
            several = (
                len(rates) > 1
            )  # with two encoders kohya's layers are lora_te1_..., lora_te2_...
            start = f"{prefix}{number}_" if several else prefix
            held = tuple(f for f in survey.factors if f.layer.startswith(start))
            if held and lr > 0:
                yield PartRate(
                    f"{part} {number}" if several else part, lr, replace(survey, factors=held)
                )


def _numbers(file: Path, key: str, said: Mapping[str, str]) -> list[float]:
    """Return the rates under a key: none, one, or several."""
    text = said.get(key, "None").strip()
    if text in ("None", "", "[]"):
        return []
    try:
        values = [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value < 1e6 for value in values):
        raise InspectionError(
            f"{file}: {key} in its metadata is {shown(text)}.", "Give the rate yourself."
        )
    return values


def _is_dotted(name: str) -> bool:
    return len(name) < 200 and all(part.isidentifier() for part in name.split("."))


def _settings(arguments: str) -> dict[str, Any]:
    """Return the literal values of a text such as "scale_parameter=False,betas=(0.9, 0.99)", as
    kohya writes it.
    """
    try:
        call = ast.parse(f"f({arguments.removesuffix(')')[:10_000]})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    made: dict[str, Any] = {}
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        try:
            made[keyword.arg or ""] = ast.literal_eval(keyword.value)
        except (ValueError, RecursionError, MemoryError):  # not a literal
            continue
    return made
