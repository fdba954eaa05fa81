"""This module reads PEFT's adapter configurations.

A configuration can be stored in adapter_config.json, in the metadata of a diffusers
file, or in the modules of a model.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from .._checks import shown
from .._files import read_bytes
from ..errors import InspectionError
from ._conventions import StoredLayer
from ._pairs import Modules

_LIMIT = 10_000_000  # bytes of adapter_config.json, chosen by judgement
# A configuration without `peft_type` is one for LoRA.
_LORA_TYPES = (None, "LORA", "ADALORA")

# The name of X-LoRA's module, which scales the LoRA pairs differently for every token.
XLORA = "internal_xlora_classifier"
_OF_PEFT = re.compile("lora_(embedding_)?[AB]")

T = TypeVar("T")

_Rank = Annotated[int, Meta(ge=1, lt=2**31)]
# The bounds keep alpha / rank finite.
_Alpha = Annotated[float, Meta(ge=1e-30, le=1e30)]
# Only plain names are accepted as patterns, because a malicious regular expression in a
# downloaded file could take hours to match.
_Layer = Annotated[str, Meta(pattern=r"^\^?[\w.-]+$")]


class AdapterConfig(msgspec.Struct):
    """The settings that are read from PEFT's adapter configuration.

    The keys of `rank_pattern` and `alpha_pattern` are layer names or the last part of a
    layer name. `target_parameters` must be empty, because the ranks of experts cannot
    be read from a file.

    `where` is the path of the configuration file, and `prefix` is the beginning of the
    names of its layers. If no scaling law covers the PEFT method, `r` is 0.
    """

    r: _Rank
    lora_alpha: _Alpha | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = None
    target_parameters: Annotated[list[str], Meta(max_length=0)] | None = None
    rank_pattern: dict[_Layer, _Rank] | None = None
    alpha_pattern: dict[_Layer, _Alpha] | None = None
    peft_type: str | None = None
    where: str = ""
    prefix: str = ""


def declare(layer: StoredLayer, configs: Iterable[AdapterConfig]) -> None:
    """Set rank, alpha and other values from a PEFT configuration as attributes of a
    layer.

    The attributes have the same names as in PEFT's modules. Attributes that
    already exist, such as an alpha from the tensor file, are not overwritten. PEFT's
    pairs are assigned to the adapter "default".

    Args:
        layer: the layer of a file.
        configs: the configurations of the file. The first one whose prefix matches the
            name of the layer is used.
    """
    config = next((c for c in configs if layer.name.startswith(c.prefix)), None)
    if config is None or not config.r:
        return
    layer.where += f", with {config.where},"
    # The conventions for PEFT require an adapter name, but some files contain none.
    # Since we know from the configuration that PEFT wrote this file, we set the name
    # here.
    for name, adapter in [*layer.halves]:
        if _OF_PEFT.fullmatch(name):
            half = layer.halves.pop((name, adapter))
            layer.halves[name, "default"] = half
    name = layer.name.removeprefix(config.prefix).removeprefix("base_model.model.")
    name = name.partition(".base_layer")[0]
    rank = _by_pattern(name, config.rank_pattern, config.r)
    alpha = _by_pattern(name, config.alpha_pattern, config.lora_alpha)
    # The scaling is later computed as alpha / rank. With rsLoRA it must be alpha /
    # √rank, so alpha is multiplied by √rank here.
    if config.use_rslora and alpha is not None:
        alpha *= math.sqrt(rank)
    declared = {"peft_config": {"default": config}, "r": rank, "alpha": alpha}
    # AdaLoRA lowers ranks during training, so the declared rank would not agree with
    # the shapes. Its `scaling` attribute contains alpha.
    if config.peft_type == "ADALORA":
        declared |= {"r": None, "lora_E": None, "scaling": alpha}
    vars(layer).update({**declared, **vars(layer)})


def _by_pattern(name: str, patterns: Mapping[str, T] | None, default: T) -> T:
    """Return the value of the first pattern that matches a layer's name, or the default."""
    for pattern, value in (patterns or {}).items():
        # PEFT has the same rule: a pattern must match the whole name or its last part.
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


# --- reading --------------------------------------------------------------------------------------


def read_config(path: Path) -> AdapterConfig:
    """Read and check PEFT's adapter_config.json.

    Raises:
        InspectionError: the file does not exist, is not a JSON object, or contains a
            value of the wrong type.
    """
    with usable(str(path)):
        text = read_bytes(path, _LIMIT)
        values = msgspec.json.decode(text, type=dict[str, Any])
        return _checked(str(path), values)


def embedded_configs(path: Path, metadata: Mapping[str, str]) -> list[AdapterConfig]:
    """Read the PEFT configurations that diffusers stores in the metadata of a file.

    A file contains one configuration for each model of the pipeline, such as the unet
    and the text encoder. Configurations with long prefixes come first, because the
    first matching configuration is used.
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return []
    where = f"the entry lora_adapter_metadata of {path}"
    parts = defaultdict[str, dict[str, Any]](dict)
    with usable(where):
        values = msgspec.json.decode(text, type=dict[str, Any])
        for key, value in values.items():
            prefix, dot, name = key.rpartition(".")
            parts[prefix + dot][name] = value
        longest_first = sorted(parts, key=len, reverse=True)
        return [_checked(where, parts[prefix], prefix) for prefix in longest_first]


@contextmanager
def usable(where: str) -> Iterator[None]:
    """Raise an `InspectionError` with the name of the file if reading the file fails."""
    try:
        yield
    # msgspec, safetensors and NumPy raise many types of errors for damaged files.
    except Exception as error:
        reason = str(error)[:200]
        raise InspectionError(
            f"Cannot read {where}: {reason}.",
            "Pass a complete .safetensors file or a folder that PEFT has saved. Or load the"
            " adapter into a model and call inspect_model(model).",
        ) from error


def _checked(where: str, values: Mapping[str, Any], prefix: str = "") -> AdapterConfig:
    """Check the types of a configuration's values and convert it to an `AdapterConfig`."""
    kind = values.get("peft_type")
    if kind not in _LORA_TYPES:
        return AdapterConfig(0, peft_type=shown(kind), prefix=prefix)
    values = {**values, "where": where, "prefix": prefix}
    # In AdaLoRA's configuration, `init_r` is the rank and `rank_pattern` contains
    # masks.
    if kind == "ADALORA":
        values |= {"r": values.get("init_r"), "rank_pattern": None}
    return msgspec.convert(values, AdapterConfig)


# --- the configurations of a model ----------------------------------------------------------------


def declared_around(modules: Modules) -> dict[str, dict[str, object]]:
    """Collect the PEFT settings that apply to every module.

    Returns:
        For each module's name, a dict with the `init_lora_weights` of every adapter. If
        X-LoRA is active, the dict also contains the key `XLORA`. The settings come from
        the module or its parent modules.
    """
    declared: dict[str, dict[str, object]] = {"": {}}
    for layer, module in modules:
        parent = layer.rpartition(".")[0]
        # Parents come before their children, so the parent's settings are already
        # there. A wrapper such as DDP and the module inside it have the same name.
        around = declared.get(layer, declared.get(parent, {}))
        attributes = vars(module)
        configs = attributes.get("peft_config") or {}
        here: dict[str, object] = {}
        for adapter, config in configs.items():
            here[adapter] = getattr(config, "init_lora_weights", None)
        if XLORA in attributes.get("_modules", ()):
            here[XLORA] = True
        declared[layer] = {**around, **here} if here else around
    return declared


def other_methods(modules: Modules) -> list[str]:
    """Return the names of the PEFT methods that a model uses, apart from LoRA and AdaLoRA."""
    methods = set[str]()
    for _, module in modules:
        configs = vars(module).get("peft_config") or {}
        for config in configs.values():
            peft_type = getattr(config, "peft_type", None)
            methods.add(str(getattr(peft_type, "value", peft_type)))
    return sorted(methods - set(map(str, _LORA_TYPES)))
