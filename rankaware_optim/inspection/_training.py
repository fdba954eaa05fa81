"""How an adapter was trained, from its file's metadata. kohya's scripts write rates, optimizer and
steps into it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .._types import Survey
from ..errors import InspectionError
from ._inspect_file import adapter_file, inspect_file
from ._safetensors import read_header, shown

_PARTS = (
    ("UNet", "ss_unet_lr", "lora_unet"),
    ("text encoder", "ss_text_encoder_lr", "lora_te"),
)


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
    metadata = read_header(file).metadata
    rates = tuple(_rates(file, survey, metadata))
    if not rates:
        raise InspectionError(
            f"{file} has no learning rate: there is no ss_learning_rate in its metadata.",
            "Give the rate yourself, before --from in a shell.",
        )
    name, _, arguments = metadata.get("ss_optimizer", "").partition("(")
    steps = metadata.get("ss_max_train_steps", "")
    count = int(steps) if steps.isdecimal() and len(steps) < 16 else 0
    return Training(
        rates, name if _is_dotted(name) else "", _settings(arguments), count or None
    )


def _rates(
    file: Path, survey: Survey, metadata: Mapping[str, str]
) -> Iterator[PartRate]:
    """Yield the rates of the parts in the file, or one rate for all if no part has its own."""
    common = _numbers(file, "ss_learning_rate", metadata)[:1]
    parts = [(*part, _numbers(file, part[1], metadata)) for part in _PARTS]
    if not any(rates for *_, rates in parts):
        parts = [("", "", "", common)]
    for part, _, prefix, rates in parts:
        rates = rates or common
        for number, lr in enumerate(rates, 1):
            # With two encoders kohya's layers are lora_te1_..., lora_te2_...
            name, start = part, prefix
            if len(rates) > 1:
                name, start = f"{part} {number}", f"{prefix}{number}_"
            factors = tuple(f for f in survey.factors if f.layer.startswith(start))
            if factors and lr > 0:
                yield PartRate(name, lr, replace(survey, factors=factors))


def _numbers(file: Path, key: str, metadata: Mapping[str, str]) -> list[float]:
    """Return the rates under a key: none, one, or several."""
    text = metadata.get(key, "None").strip()
    if text in ("None", "", "[]"):
        return []
    try:
        values = [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value < 1e6 for value in values):
        raise InspectionError(
            f"{file}: {key} in its metadata is {shown(text)}.",
            "Give the rate yourself.",
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
    settings: dict[str, Any] = {}
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        with suppress(ValueError, RecursionError, MemoryError):  # not a literal
            settings[keyword.arg or ""] = ast.literal_eval(keyword.value)
    return settings
