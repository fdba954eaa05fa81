"""PEFT's configurations: adapter_config.json, a diffusers file's copy, and those in a model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from .._checks import shown
from .._files import read_bytes
from ..errors import InspectionError
from ._pairs import Modules, Pair

_LIMIT = 10_000_000  # bytes of a file: by hand
LORA_TYPES = (None, "LORA", "ADALORA")  # a configuration without a type is for LoRA
_FROM_PEFT = "Give an adapter as PEFT saves it."

_Rank = Annotated[int, Meta(ge=1, lt=2**31)]
# its quotient by a rank is a float too
_Alpha = Annotated[float, Meta(ge=1e-30, le=1e30)]
_Patterns = Meta(max_length=4096)


class _Entries(msgspec.Struct):
    """The entries of a configuration that are read. A pattern is a layer's name or its end."""

    r: _Rank
    lora_alpha: _Alpha | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = None
    target_parameters: list[str] | None = None
    rank_pattern: Annotated[dict[str, _Rank], _Patterns] | None = None
    alpha_pattern: Annotated[dict[str, _Alpha], _Patterns] | None = None


class Declared(NamedTuple):
    """What is declared for one layer: its rank, alpha, whether this is divided by √rank, and PEFT's
    init.
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool | None = None
    init: bool | str | None = None

    def scaling(self, rank: float) -> float | None:
        """Return the multiplier of B·A at a rank, None if no alpha is declared."""
        if self.alpha is None:
            return None
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class AdapterConfig:
    """A checked configuration. where: its file. kind: its `peft_type`. entries: None if no law
    covers the kind. prefix: how the names of its layers begin.
    """

    where: str
    kind: str | None
    entries: _Entries | None
    prefix: str = ""

    def declared(self, layer: str) -> Declared:
        """Return the declarations for a layer, whose name is that in the file."""
        if self.entries is None:
            return Declared()
        e = self.entries
        name = layer.removeprefix(self.prefix).removeprefix("base_model.model.")
        name = name.partition(".base_layer")[0]
        rank = _by_pattern(name, e.rank_pattern, e.r)
        alpha = _by_pattern(name, e.alpha_pattern, e.lora_alpha)
        if self.kind == "ADALORA":  # it prunes ranks
            rank = None
        return Declared(rank, alpha, e.use_rslora, e.init_lora_weights)


def _by_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """Return the value of the first pattern by which PEFT finds the layer, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


# --- reading --------------------------------------------------------------------------------------


def read_config(path: Path) -> AdapterConfig:
    """Read PEFT's adapter_config.json.

    Raises:
        InspectionError: it is missing, not a JSON object, or an entry that is used has the wrong
            type.
    """
    if not os.path.isfile(path):
        raise InspectionError(
            f"There is no file {path}.", "Give a folder saved by PEFT."
        )
    try:
        text = read_bytes(path, _LIMIT)
    except OSError as error:
        raise InspectionError(f"{path} cannot be read: {error}.", _FROM_PEFT) from error
    return _checked(str(path), json_object(str(path), text))


def embedded_configs(path: Path, metadata: Mapping[str, str]) -> list[AdapterConfig]:
    """Return the configurations in a diffusers file, one for each part of the model ("unet.r",
    "text_encoder.r"), the longest prefix first.
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return []
    where = f"{path}: lora_adapter_metadata"
    values = json_object(where, text)
    prefixes = {key[:-1] for key in values if f".{key}".endswith(".r")}
    configs = []
    for prefix in sorted(prefixes, key=len, reverse=True):
        part = {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix)
        }
        configs.append(_checked(where, part, prefix))
    return configs


def json_object(where: str, text: bytes | str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InspectionError(
            f"{where} cannot be read as a JSON object: {error}.",
            _FROM_PEFT,
        ) from error
    return values


def _checked(where: str, values: Mapping[str, Any], prefix: str = "") -> AdapterConfig:
    kind = values.get("peft_type")
    if kind not in LORA_TYPES:
        return AdapterConfig(where, shown(kind), None, prefix)
    if kind == "ADALORA":  # its rank is `init_r`, its patterns are masks
        values = {
            "r": values.get("init_r"),
            "lora_alpha": values.get("lora_alpha"),
            "init_lora_weights": values.get("init_lora_weights"),
        }
    try:
        entries = msgspec.convert(values, _Entries)
    except msgspec.ValidationError as error:
        raise InspectionError(
            f"{where} has an entry that cannot be used: {error}.",
            _FROM_PEFT,
        ) from error
    if entries.target_parameters:
        raise InspectionError(
            f"{where} adapts experts by target_parameters, whose ranks a file does not tell.",
            "Inspect the model itself with inspect_model.",
        )
    for pattern in (*(entries.rank_pattern or ()), *(entries.alpha_pattern or ())):
        # any other regex could take very long to match
        if not re.fullmatch(r"\^?[\w.-]+", pattern):
            raise InspectionError(
                f"{where} has the pattern {shown(pattern)}, which is no plain name.",
                "Inspect the model itself with inspect_model.",
            )
    return AdapterConfig(where, kind, entries, prefix)


# --- the configurations of a model ----------------------------------------------------------------

Fields = Mapping[str, Any]
Configs = Mapping[tuple[str, str], Fields]
"""The fields of configurations, by the name of a module that holds them and the adapter's name."""


def configs_of(modules: Modules) -> Configs:
    """Return all of PEFT's LoRA configurations in a model."""
    configs: dict[tuple[str, str], Fields] = {}
    for layer, module in modules:
        by_adapter = module.__dict__.get("peft_config")
        if not isinstance(by_adapter, Mapping):
            continue
        for adapter, config in by_adapter.items():
            is_dict = isinstance(config, Mapping)
            fields: Any = config if is_dict else getattr(config, "__dict__", {})
            if "lora_alpha" in fields and "r" in fields:
                configs[layer, adapter] = fields
    return configs


def config_of(pair: Pair, configs: Configs) -> Fields:
    """Return the configuration of a pair's adapter in the innermost module around it, else {}."""
    layer = pair.layer
    while layer and (layer, pair.adapter) not in configs:
        layer = layer.rpartition(".")[0]
    return configs.get((layer, pair.adapter), {})
