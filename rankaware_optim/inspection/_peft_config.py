"""PEFT's configurations: in adapter_config.json, as a copy in a diffusers file, and in a model."""

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
# A configuration without a type is for LoRA.
_LORA_TYPES = (None, "LORA", "ADALORA")

# X-LoRA's module. It scales the LoRA pairs inside it by a different number for each token.
XLORA = "internal_xlora_classifier"
_OF_PEFT = re.compile("lora_(embedding_)?[AB]")

T = TypeVar("T")

_Rank = Annotated[int, Meta(ge=1, lt=2**31)]
# The bounds keep alpha / rank finite.
_Alpha = Annotated[float, Meta(ge=1e-30, le=1e30)]
# Only plain names are accepted as patterns: matching a hostile regex can take very long.
_Layer = Annotated[str, Meta(pattern=r"^\^?[\w.-]+$")]


class AdapterConfig(msgspec.Struct):
    """The entries of PEFT's configuration that are used.

    A pattern is the name of a layer, or the end of one. `target_parameters` must be empty, because
    a file does not show the ranks of experts.

    where: the file that it comes from. prefix: the start of the names of its layers. r: 0 if no law
    covers the type.
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
    """Set the values that a configuration declares for a layer as attributes, under the names that
    PEFT's modules use. Numbers in the file itself take precedence. The layer's pairs belong to
    PEFT's adapter "default".

    configs: the configurations of the file. The first one with a matching prefix applies.
    """
    config = next((c for c in configs if layer.name.startswith(c.prefix)), None)
    if config is None or not config.r:
        return
    layer.where += f", with {config.where},"
    # Under this name PEFT's own rows find the pairs, whether the file has an adapter's name or not.
    for name, adapter in [*layer.halves]:
        if _OF_PEFT.fullmatch(name):
            half = layer.halves.pop((name, adapter))
            layer.halves[name, "default"] = half
    name = layer.name.removeprefix(config.prefix).removeprefix("base_model.model.")
    name = name.partition(".base_layer")[0]
    rank = _by_pattern(name, config.rank_pattern, config.r)
    alpha = _by_pattern(name, config.alpha_pattern, config.lora_alpha)
    # Scaling is alpha / rank here, and alpha / √rank with rsLoRA.
    if config.use_rslora and alpha is not None:
        alpha *= math.sqrt(rank)
    declared = {"peft_config": {"default": config}, "r": rank, "alpha": alpha}
    # AdaLoRA lowers ranks in training, so none is declared, and its `scaling` is alpha.
    if config.peft_type == "ADALORA":
        declared |= {"r": None, "lora_E": None, "scaling": alpha}
    vars(layer).update({**declared, **vars(layer)})


def _by_pattern(name: str, patterns: Mapping[str, T] | None, default: T) -> T:
    """Return the value of the first pattern that matches the layer as in PEFT, else the default."""
    for pattern, value in (patterns or {}).items():
        # as in PEFT: at the start of the name or after a dot, up to its end
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


# --- reading --------------------------------------------------------------------------------------


def read_config(path: Path) -> AdapterConfig:
    """Read PEFT's adapter_config.json.

    Raises:
        InspectionError: the file is missing or not a JSON object, or an entry has the wrong type.
    """
    with usable(str(path)):
        text = read_bytes(path, _LIMIT)
        values = msgspec.json.decode(text, type=dict[str, Any])
        return _checked(str(path), values)


def embedded_configs(path: Path, metadata: Mapping[str, str]) -> list[AdapterConfig]:
    """Return the configurations in the metadata of a diffusers file: one for each part of the
    model, such as the unet and the text encoder. Those with longer prefixes come first, because the
    first that matches applies.
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return []
    where = f"{path}: lora_adapter_metadata"
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
    """Turn whatever reading a file raises into an InspectionError that names the file."""
    try:
        yield
    except Exception as error:  # msgspec, safetensors and NumPy raise many kinds
        raise InspectionError(
            f"{where} cannot be used: {str(error)[:200]}.",
            "Pass a complete .safetensors file or a folder that PEFT saved, or inspect the model"
            " itself with inspect_model().",
        ) from error


def _checked(where: str, values: Mapping[str, Any], prefix: str = "") -> AdapterConfig:
    """Return a configuration, with the types of its entries checked."""
    kind = values.get("peft_type")
    if kind not in _LORA_TYPES:
        return AdapterConfig(0, peft_type=shown(kind), prefix=prefix)
    values = {**values, "where": where, "prefix": prefix}
    if kind == "ADALORA":  # its rank is `init_r`, and its patterns are masks
        values |= {"r": values.get("init_r"), "rank_pattern": None}
    return msgspec.convert(values, AdapterConfig)


# --- the configurations of a model ----------------------------------------------------------------


def declared_around(modules: Modules) -> dict[str, dict[str, object]]:
    """Return for every module, by name, two facts from PEFT's configurations on it or around it:
    the `init_lora_weights` of each adapter, and whether X-LoRA is active (under the key `XLORA`).
    """
    declared: dict[str, dict[str, object]] = {"": {}}
    for layer, module in modules:
        parent = layer.rpartition(".")[0]
        # Parents come before children. A wrapper and the module inside it have one name.
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
    """Return the names of PEFT's methods in a model, other than LoRA's."""
    methods = set[str]()
    for _, module in modules:
        configs = vars(module).get("peft_config") or {}
        for config in configs.values():
            peft_type = getattr(config, "peft_type", None)
            methods.add(str(getattr(peft_type, "value", peft_type)))
    return sorted(methods - set(map(str, _LORA_TYPES)))
