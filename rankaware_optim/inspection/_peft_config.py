"""PEFT's configurations: adapter_config.json, a diffusers file's copy, and those in a model."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, MsgspecError
from safetensors import SafetensorError

from .._checks import shown
from .._files import read_bytes
from ..errors import InspectionError
from ._conventions import StoredLayer
from ._pairs import Modules

_LIMIT = 10_000_000  # bytes of a file: by hand
LORA_TYPES = (None, "LORA", "ADALORA")  # a configuration without a type is for LoRA

_OF_PEFT = re.compile("lora_(embedding_)?[AB]")

_Rank = Annotated[int, Meta(ge=1, lt=2**31)]
# its quotient by a rank is a float too
_Alpha = Annotated[float, Meta(ge=1e-30, le=1e30)]
# A plain name: any other regex could take very long to match.
_Layer = Annotated[str, Meta(pattern=r"^\^?[\w.-]+$")]
_Patterns = Meta(max_length=4096)


class _Entries(msgspec.Struct):
    """The entries of a configuration that are read. A pattern is a layer's name or its end. Experts
    have ranks that a file does not show.
    """

    r: _Rank
    lora_alpha: _Alpha | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = None
    target_parameters: Annotated[list[str], Meta(max_length=0)] | None = None
    rank_pattern: Annotated[dict[_Layer, _Rank], _Patterns] | None = None
    alpha_pattern: Annotated[dict[_Layer, _Alpha], _Patterns] | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """A checked configuration. where: its file. kind: its `peft_type`. entries: None if no law
    covers the kind. prefix: how the names of its layers begin.
    """

    where: str
    kind: str | None
    entries: _Entries | None
    prefix: str = ""

    def declare(self, layer: StoredLayer) -> None:
        """Set what is declared for a layer as a module has it. The file's own alpha goes first. A
        pair is of PEFT's adapter "default".
        """
        layer.where += f", with {self.where},"
        e = self.entries
        if e is None:
            return
        for key in [*layer.halves]:
            if _OF_PEFT.fullmatch(key[0]):
                layer.halves[key[0], "default"] = layer.halves.pop(key)
        name = layer.name.removeprefix(self.prefix).removeprefix("base_model.model.")
        name = name.partition(".base_layer")[0]
        rank = _by_pattern(name, e.rank_pattern, e.r)
        alpha = _by_pattern(name, e.alpha_pattern, e.lora_alpha)
        values: dict[str, Any] = {"peft_config": {"default": e}}
        if self.kind == "ADALORA":  # it prunes ranks, and `scaling` is alpha
            values |= {"lora_E": None, "scaling": alpha}
        else:
            values["r"] = rank
            if alpha is not None and not isinstance(vars(layer).get("alpha"), float):
                root = math.sqrt(rank) if e.use_rslora else rank
                values["scaling"] = alpha / root
        vars(layer).update(values)


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
    with usable(str(path)):
        values = msgspec.json.decode(read_bytes(path, _LIMIT), type=dict[str, Any])
        return _checked(str(path), values)


def embedded_configs(path: Path, metadata: Mapping[str, str]) -> list[AdapterConfig]:
    """Return the configurations in a diffusers file, one for each part of the model ("unet.r",
    "text_encoder.r"), the longest prefix first.
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return []
    where = f"{path}: lora_adapter_metadata"
    parts = defaultdict[str, dict[str, Any]](dict)
    with usable(where):
        for key, value in msgspec.json.decode(text, type=dict[str, Any]).items():
            prefix, dot, name = key.rpartition(".")
            parts[prefix + dot][name] = value
        longest_first = sorted(parts, key=len, reverse=True)
        return [_checked(where, parts[prefix], prefix) for prefix in longest_first]


@contextmanager
def usable(where: str) -> Iterator[None]:
    """Raise an InspectionError that names a file if it cannot be read."""
    try:
        yield
    except (
        OSError,
        MsgspecError,
        SafetensorError,
        ValueError,
        TypeError,  # of kinds of numbers that NumPy does not have
        AttributeError,
        RecursionError,
    ) as error:
        raise InspectionError(
            f"{where} cannot be used: {str(error)[:200]}.",
            "Give a complete .safetensors file or a folder as PEFT saves it, or inspect the model"
            " itself (inspect_model).",
        ) from error


def _checked(where: str, values: Mapping[str, Any], prefix: str = "") -> AdapterConfig:
    kind = values.get("peft_type")
    if kind not in LORA_TYPES:
        return AdapterConfig(where, shown(kind), None, prefix)
    if kind == "ADALORA":  # its rank is `init_r`, its patterns are masks
        values = {**values, "r": values.get("init_r"), "rank_pattern": None}
    return AdapterConfig(where, kind, msgspec.convert(values, _Entries), prefix)


# --- the configurations of a model ----------------------------------------------------------------


def declared_inits(modules: Modules) -> dict[str, dict[str, object]]:
    """Return the `init_lora_weights` of PEFT's configurations by module and adapter. A module has
    those of the modules around it too.
    """
    inits: dict[str, dict[str, object]] = {"": {}}
    for layer, module in modules:
        around = inits.get(layer, inits.get(layer.rpartition(".")[0], {}))
        inits[layer] = dict(around)
        configs = vars(module).get("peft_config")
        for adapter, config in configs.items() if isinstance(configs, Mapping) else ():
            inits[layer][adapter] = getattr(config, "init_lora_weights", None)
    return inits
