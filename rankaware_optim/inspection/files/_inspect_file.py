"""Surveys of adapter files, PEFT folders or .safetensors files. Only headers are read, and no
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from ..._checks import check_init
from ..._types import Factor, Init, Survey
from ...errors import InspectionError
from .._conventions import KEYS, Convention, Reading
from .._pairs import Half, Pair, is_shard, read_as
from .._survey import declared_init, factor_of
from .._unsupported import is_other_adapter, unsupported
from ._keys import NamedPair, named_pairs, refuse_collisions
from ._peft_config import (
    LORA_TYPES,
    AdapterConfig,
    Declared,
    embedded_configs,
    is_alpha,
    read_config,
)
from ._safetensors import Header, read_header, shown

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Entries of kohya's scripts, each with the prefix "ss_".
_SAID = (
    "network_module network_dim network_alpha learning_rate unet_lr text_encoder_lr optimizer"
    " max_train_steps"
)


def inspect_file(path: str | Path, *, init: Init | None = None) -> Survey:
    """Find the LoRA pairs of an adapter on disk. Nothing is unpickled, and no tensors are loaded.

    The names of all conventions are known, registered ones included: PEFT, kohya, LyCORIS (Tucker
    too), diffusers (old and new), torchtune and loralib. Rank, fan-in and fan-out come from the
    shapes. The rank must agree with the one that the file or a configuration declares. The scaling
    comes from the file's entries (kohya's `alpha`), the configuration (PEFT's, or the copy in a
    diffusers file), or kohya's metadata. Otherwise it is 1, with a note. The adapter is usually
    trained, so its init is the declared one, or "unknown". The survey of an adapter without a law,
    such as LoHa, has no factors.

    Args:
        path: a folder with PEFT's adapter_config.json and a .safetensors file, or one .safetensors
            file.
        init: the init of all pairs, as for `inspect_model`, if the declared one is not theirs, as
            after `initialize`.

    Raises:
        InspectionError: something is missing, damaged or contradictory. The message names the file
            and the key.
    """
    check_init(init, known=(*get_args(Init), None))
    file, config = _found(Path(path))
    header = read_header(file)
    pairs = list(_file_pairs(header, config))
    refuse_collisions(header, (found.pair for found in pairs))
    notes: list[str] = []
    factors = tuple(factor for found in pairs for factor in _factors(found, init, notes))
    known = {f.name for f in factors}
    left = [name for name in header.tensors if name not in known]
    unlawful = [name for name in left if is_other_adapter(name)]
    numbers = {
        entry for found in pairs for entry, _ in found.numbers.values()
    }  # entries of adapters, not of the model
    numbers |= {
        f"{name.removesuffix('.weight').rpartition('.')[0]}.alpha" for name in unlawful
    }  # as of x.hada_w1_a
    other = tuple(name for name in left if not (name in numbers and header.is_scalar(name)))
    kind = None if config is None else config.values.get("peft_type")
    if kind not in LORA_TYPES:
        notes.append(f"The folder's adapter is {kind}, which no law covers.")
    elif not factors and not unlawful:
        raise InspectionError(
            f"{file} has no LoRA pair among {len(header.tensors)} tensors.",
            "Give an adapter's file, not a base model's.",
        )
    keys = [f"ss_{name}" for name in _SAID.split()]
    said = [f"{key} {shown(header.metadata[key])}" for key in keys if key in header.metadata]
    if said:
        notes.append(f"Its metadata has {', '.join(said)}.")
    if config is None and os.path.isfile(file.with_name(_CONFIG)):
        notes.append(f"{_CONFIG} in the file's folder was not read. Give the folder to read it.")
    notes = list(dict.fromkeys(notes))
    return Survey(
        factors, other, tuple(notes), looked_at=len(header.tensors), unsupported=unsupported(other)
    )


# --- the file -------------------------------------------------------------------------------------


def adapter_file(path: str | Path) -> Path:
    """Return the safetensors file that `inspect_file` reads: `path`, or the one in that folder."""
    return _found(Path(path))[0]


def _found(path: Path) -> tuple[Path, AdapterConfig | None]:
    """Return the safetensors file, `path` or the one in that folder, and the folder's configuration
    if there is one.
    """
    if not os.path.isdir(path):
        if path.suffix.lower() in _PICKLES:
            raise _pickle(path)
        return path, None
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InspectionError(
            f"{path} cannot be read: {error}.", "Give a folder that you may read."
        ) from error
    config = read_config(path / _CONFIG) if _CONFIG in names else None
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1 or (config is not None and _WEIGHTS in files):
        return path / (_WEIGHTS if _WEIGHTS in files else files[0]), config
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles and not files:
        raise _pickle(path / pickles[0])
    raise InspectionError(
        f"{path} has {len(files)} .safetensors files"
        + (f", none of them {_WEIGHTS}." if config is not None else f" and no {_CONFIG}."),
        "Give one .safetensors file, or a folder saved by PEFT.",
    )


def _pickle(path: Path) -> InspectionError:
    return InspectionError(
        f"{path} is a pickle by its name. Reading a pickle can run any code in it.",
        "Save the adapter as .safetensors.",
    )


# --- pairs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FilePair:
    """A pair in a file. Its owner has the attributes of its rows that the file or the configuration
    contains.

    numbers: by attribute, the file's entry for rank, scaling or alpha, and its value.
    """

    header: Header
    pair: Pair
    numbers: Mapping[str, tuple[str, float]]
    declared: Declared


def _file_pairs(header: Header, config: AdapterConfig | None) -> Iterator[_FilePair]:
    named = named_pairs(header)
    layers = _declared(header, list(dict.fromkeys(pair.layer for pair in named)), config)
    entries = [_entries(header, pair) for pair in named]
    values = header.scalars(
        {name for found in entries for name in found.values() if header.is_scalar(name)}
    )
    for found, held in zip(named, entries, strict=True):
        declared = layers[found.layer]
        a, b = (Half(name, header.tensors[name]) for name in (found.a, found.b))  # type: ignore[arg-type]
        owner = SimpleNamespace(**_attributes(declared, a.tensor.shape, b.tensor.shape))
        for attribute, entry in held.items():
            tensor = header.tensors[entry]
            whole = SimpleNamespace(weight=tensor) if entry.endswith(".weight") else tensor
            setattr(owner, attribute, values.get(entry, whole))
        row = _row(found, owner, declared)
        if row is not None:
            asked = [
                name for name in (*row.rank, *row.scaling, *row.alpha) if held.get(name) in values
            ]
            numbers = {name: (held[name], values[held[name]]) for name in asked}
            pair = Pair(owner, found.layer, found.adapter, row, a, b)
            yield _FilePair(header, pair, numbers, declared)


def _declared(
    header: Header, layers: Sequence[str], config: AdapterConfig | None
) -> dict[str, Declared]:
    """Return what the configuration declares for each layer."""
    configs = [config] if config is not None else embedded_configs(header.path, header.metadata)
    made = dict.fromkeys(layers, Declared())
    for found in reversed(configs):  # the longest prefix is last and takes precedence
        made |= found.declared(
            [layer for layer in layers if found is config or layer.startswith(found.prefix)]
        )
    return made


def _entries(header: Header, pair: NamedPair) -> dict[str, str]:
    """Return the file's entries for the attributes of the pair's rows, by attribute."""
    attributes = {
        name for row in pair.rows for name in (*row.where, *row.rank, *row.scaling, *row.alpha)
    }
    ends = (
        ("", ".weight", f".{pair.adapter}", f".{pair.adapter}.weight")
        if pair.adapter
        else ("", ".weight")
    )
    start = f"{pair.layer}." if pair.layer else ""
    names = ((name, f"{start}{name}{end}") for name in attributes for end in ends)
    return {name: entry for name, entry in names if entry in header.tensors}


def _attributes(declared: Declared, a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    """Return the owner's attributes from the configuration and the shapes."""
    if len(a) < 2 or len(b) < 2 or 0 in (*a, *b):
        return {}
    config = declared.config
    found: dict[str, Any] = {"base_layer": SimpleNamespace(groups=max(1, a[0] // b[1]))}
    if config is not None and config.is_adalora:
        found["lora_E"] = None
    if declared.experts and declared.rank and a[0] == b[1] and a[0] % declared.rank == 0:
        found |= {"parameter_name": None, "num_experts": a[0] // declared.rank}
    if config is not None and config.enabled and a[0] == b[1] * config.enabled:
        found |= {"r": b[1], "enable_lora": [True] * config.enabled}
    return found


def _row(pair: NamedPair, owner: object, declared: Declared) -> Convention | None:
    """Return the first row whose other attributes the owner has. Names or a configuration show a
    dict by adapter.
    """
    rows = [
        row
        for row in pair.rows
        if row.keys != KEYS or all(hasattr(owner, name) for name in row.where)
    ]
    shown = (
        row
        for row in rows
        if not row.container or row.where or pair.adapter or declared.config is not None
    )
    return next(shown, rows[0] if rows else None)


# --- readings -------------------------------------------------------------------------------------


def _factors(found: _FilePair, init: Init | None, notes: list[str]) -> tuple[Factor, Factor]:
    pair, config, reading = found.pair, found.declared.config, _reading(found)
    scaling = _scaling(found, reading)
    if scaling is None:
        notes.append("The file and its folder have no alpha: scaling 1 is assumed.")
    declared = None if config is None else config.values.get("init_lora_weights")
    init = (
        init
        or pair.convention.init
        or ("unknown" if declared is None else declared_init(declared, reading.kind or "linear"))
    )
    a = factor_of(pair, "A", pair.a.name, reading, scaling, init)
    return a, replace(a, name=pair.b.name, role="B")


def _reading(found: _FilePair) -> Reading:
    """Return a pair's reading, by the first of the row's layouts that fits both shapes and the
    declared rank.
    """
    pair, path = found.pair, found.header.path
    a, b = pair.a.tensor.shape, pair.b.tensor.shape
    layouts = () if is_shard(pair.a) or is_shard(pair.b) else pair.convention.layouts
    readings = [
        r
        for r in (read_as(layout, pair) for layout in layouts)
        if r is not None and r.rank_a == r.rank_b
    ]
    readings = [reading for reading in readings if reading.fan_in > 0 and reading.fan_out > 0]
    if not readings:
        raise InspectionError(
            f"{path}: {pair.a.name} has shape {a} and {pair.b.name} {b}, which is not a LoRA pair.",
            "Save the adapter again, or register its layout with register_convention().",
        )
    own = next(
        (found.numbers[name] for name in pair.convention.rank if name in found.numbers), None
    )
    declared = found.declared.rank if own is None else own[1]
    reading = next((reading for reading in readings if reading.rank_a == declared), readings[0])
    pruned = reading.kind == "adalora" and reading.rank_a < (declared or 0)
    if declared not in (None, reading.rank_a) and not pruned:
        config = getattr(found.declared.config, "where", "")
        odds = f"{config} declares {declared}. @ r" if own is None else f"{own[0]} is {declared:g}."
        raise InspectionError(
            f"{path}: {pair.a.name} has rank {reading.rank_a:g} by its shape {a}, but {odds}",
            "Use the configuration and the file of the same adapter.",
        )
    return reading


def _scaling(found: _FilePair, reading: Reading) -> float | None:
    """Return the multiplier of B·A from the file's numbers, the configuration or kohya's metadata,
    else None.
    """
    row, declared, rank = found.pair.convention, found.declared, reading.rank_a
    name = next((name for name in (*row.scaling, *row.alpha) if name in found.numbers), None)
    value: Any = None
    if name is not None:
        where, value = found.numbers[name]
    elif declared.config is not None:
        return None if declared.alpha is None else declared.config.scaling(declared.alpha, rank)
    elif reading.kind == "linear" and row.a.endswith("down"):  # not conv_alpha
        where, value = (
            "ss_network_alpha in its metadata",
            found.header.metadata.get("ss_network_alpha"),
        )
        with suppress(ValueError):
            value = (
                None if value in (None, "None", "Dynamic") else float(value)
            )  # kohya's words for a missing alpha
    if value is None:
        return None
    if not is_alpha(value):
        cure = "Save the adapter with a positive alpha."
        raise InspectionError(f"{found.header.path}: {where} is {shown(value)}.", cure)
    return float(value) if name in row.scaling else float(value / rank)
