"""Surveys of adapter files by their headers alone: a PEFT folder, or a .safetensors file; no tensor data is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._types import Factor, Survey
from ...errors import InspectionError
from .._survey import declared_init
from .._unsupported import is_other_adapter, unsupported
from ._keys import FilePair, FileReading, file_pairs, file_reading
from ._peft_config import UNSAID, AdapterConfig, Declared, embedded_configs, is_alpha, read_config
from ._safetensors import Header, read_header, shown

__all__ = ["inspect_file"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SAID = ("ss_network_module", "ss_network_dim", "ss_network_alpha")  # by kohya's scripts


def inspect_file(path: str | Path) -> Survey:
    """Survey an adapter folder (PEFT's adapter_config.json with its safetensors) or one .safetensors file.

    Known are PEFT's keys, kohya's and LyCORIS's (Tucker too), diffusers' old and new ones, torchtune's and loralib's.
    Fan-in and fan-out come from the shapes, as does the rank, which must be the one that a configuration declares.
    The scaling is that of the configuration (PEFT's, or the copy in a diffusers file), of the file's `alpha` entries,
    or of kohya's metadata, else 1 with a note. An adapter on disk is trained as a rule, so its init is the one
    declared or unknown. Adapters without a law, such as LoHa, are a survey without factors. Nothing is unpickled.

    Raises:
        InspectionError: naming the file and the key that is missing, damaged or at odds.
    """
    file, config = _found(Path(path))
    header = read_header(file)
    pairs = file_pairs(header)
    told = _told(header, pairs, config)
    notes: list[str] = []
    factors = tuple(factor for pair in pairs for factor in _factors(header, pair, told[pair.layer], notes))
    known = {f.name for f in factors}
    left = [name for name in header.tensors if name not in known]
    unlawful = [name for name in left if is_other_adapter(name)]
    alphas = {f"{layer}.alpha" for layer in (*told, *_layers(unlawful))}  # of adapters, not tensors of the model
    other = tuple(name for name in left if not (name in alphas and _is_scalar(header, name)))
    if config is not None and not config.is_lora:
        notes.append(f"The folder's kind is {config.values['peft_type']}, which no law covers.")
    elif not factors and not unlawful:
        raise InspectionError(
            f"{file} holds no LoRA pair among {len(header.tensors)} tensors.",
            "Give an adapter's file, not a base model's.",
        )
    notes += _notes(header, config)
    said = tuple(dict.fromkeys(notes))
    return Survey(factors, other, said, looked_at=len(header.tensors), unsupported=unsupported(other))


# --- which file -----------------------------------------------------------------------------------------------------


def _found(path: Path) -> tuple[Path, AdapterConfig | None]:
    """The safetensors file that `path` is or holds, and the folder's configuration if there is one."""
    if not os.path.isdir(path):
        if path.suffix.lower() in _PICKLES:
            raise _pickle(path)
        return path, None
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InspectionError(f"{path} cannot be read: {error}.", "Give a folder that you may read.") from error
    config = read_config(path / _CONFIG) if _CONFIG in names else None
    return path / _weights(path, names, config), config


def _weights(path: Path, names: list[str], config: AdapterConfig | None) -> str:
    """The name of a folder's one safetensors file: PEFT's own beside a configuration, else the only one."""
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1 or (config is not None and _WEIGHTS in files):
        return _WEIGHTS if _WEIGHTS in files else files[0]
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles and not files:
        raise _pickle(path / pickles[0])
    raise InspectionError(
        f"{path} holds {len(files)} .safetensors files"
        + (f", none of them {_WEIGHTS}." if config is not None else f" and no {_CONFIG}."),
        "Give one .safetensors file, or a folder saved by PEFT.",
    )


def _pickle(path: Path) -> InspectionError:
    return InspectionError(
        f"{path} is a pickle by its name: reading one can run whatever code is in it.",
        "Save the adapter as .safetensors.",
    )


# --- what is declared -----------------------------------------------------------------------------------------------


def _layers(names: Iterable[str]) -> set[str]:
    """The layers of other adapters' tensors, such as x of x.hada_w1_a or x.b2.weight."""
    return {name.removesuffix(".weight").rpartition(".")[0] for name in names}


@dataclass(frozen=True)
class _Told:
    """What the file and its configuration say of one layer besides shapes."""

    config: AdapterConfig | None = None
    declared: Declared = UNSAID
    alpha: float | None = None  # the file's own entry


def _told(header: Header, pairs: Iterable[FilePair], config: AdapterConfig | None) -> dict[str, _Told]:
    configs = [config] if config is not None else embedded_configs(header.path, header.metadata)
    layers = list(dict.fromkeys(pair.layer for pair in pairs))
    entries = [f"{layer}.alpha" for layer in layers if _is_scalar(header, f"{layer}.alpha")]
    alphas = header.scalars(entries)
    told = {layer: _Told(alpha=alphas.get(f"{layer}.alpha")) for layer in layers}
    for found in reversed(configs):  # the longest prefix last, which so has its say
        held = [layer for layer in layers if found is config or layer.startswith(found.prefix)]
        declared = found.declared(held)
        told |= {layer: _Told(found, declared[layer], alphas.get(f"{layer}.alpha")) for layer in held}
    return told


def _is_scalar(header: Header, name: str) -> bool:
    return name in header.tensors and header.tensors[name].shape in ((), (1,))


def _scaling(header: Header, pair: FilePair, read: FileReading, told: _Told) -> float | None:
    """The multiplier on B·A: by the file's alpha, the configuration's, or kohya's metadata; None if none says it."""
    config, alpha, where = told.config, told.alpha, f"{pair.layer}.alpha"
    if alpha is None and told.declared.alpha is not None and config is not None:
        return config.scaling(told.declared.alpha, read.rank)
    if alpha is None and config is None and read.kind == "linear" and "down" in pair.marker:  # not conv_alpha
        alpha, where = _metadata_alpha(header), "ss_network_alpha in its metadata"
    if alpha is None:
        return None
    if not is_alpha(alpha):
        raise InspectionError(f"{header.path}: {where} is {alpha!r}.", "Save the adapter with a positive alpha.")
    return alpha / read.rank


def _metadata_alpha(header: Header) -> float | None:
    text = header.metadata.get("ss_network_alpha", "None")
    if text in ("None", "Dynamic"):  # what kohya's scripts write for want of one
        return None
    try:
        return float(text)
    except ValueError as error:
        raise InspectionError(
            f"{header.path}: ss_network_alpha in its metadata is {shown(text)}.", "Save it with a number there."
        ) from error


def _notes(header: Header, config: AdapterConfig | None) -> list[str]:
    """What else the file says of itself."""
    told = [f"{key} {shown(header.metadata[key])}" for key in _SAID if key in header.metadata]
    beside = config is None and os.path.isfile(header.path.with_name(_CONFIG))
    notes = [f"Its metadata say {', '.join(told)}."] if told else []
    return [*notes, *([f"{_CONFIG} lies beside the file and was not read: give the folder."] if beside else [])]


def _factors(header: Header, pair: FilePair, told: _Told, notes: list[str]) -> list[Factor]:
    read = file_reading(header, pair, told.config, told.declared)
    scaling = _scaling(header, pair, read, told)
    if scaling is None:
        notes.append("No alpha in the file or beside it: scaling 1 is assumed.")
    shared: dict[str, Any] = {
        "rank": read.rank,
        "fan_in": float(read.fan_in),
        "fan_out": float(read.fan_out),
        "scaling": 1.0 if scaling is None else scaling,
        "init": _init(told.config, read.kind),
        "kind": read.kind,
        "layer": pair.layer,
        "adapter": pair.adapter,
        "convention": read.convention,
    }
    return [Factor(pair.a, "A", **shared), Factor(pair.b, "B", **shared)]


def _init(config: AdapterConfig | None, kind: str) -> Any:
    declared = None if config is None else config.values.get("init_lora_weights")
    if kind == "adalora":
        return "other"
    return "unknown" if declared is None else declared_init(declared, kind)
