"""Surveys of adapter files, PEFT folders or .safetensors files. Only headers are read, and no
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from .._checks import check_init
from .._types import Factor, Init, Survey
from ..errors import InspectionError
from ._conventions import Reading
from ._file_pairs import FilePair, file_pairs
from ._pairs import readings_of
from ._peft_config import LORA_TYPES, AdapterConfig, is_alpha, read_config
from ._safetensors import Header, read_header, shown
from ._survey import declared_init, factors_of
from ._unsupported import is_other_adapter, unsupported

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Entries of kohya's scripts, each with the prefix "ss_".
_TRAINING = (
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
    file, config = _file_at(Path(path))
    header = read_header(file)
    pairs = file_pairs(header, config)
    notes: list[str] = []
    factors = [factor for pair in pairs for factor in _factors(header, pair, init, notes)]
    names = {f.name for f in factors}
    left = [name for name in header.tensors if name not in names]
    unlawful = [name for name in left if is_other_adapter(name)]
    kind = None if config is None else config.values.get("peft_type")
    if kind not in LORA_TYPES:
        notes.append(f"The folder's adapter is {kind}, which no law covers.")
    elif not factors and not unlawful:
        raise InspectionError(
            f"{file} has no LoRA pair among {len(header.tensors)} tensors.",
            "Give an adapter's file, not a base model's.",
        )
    notes += _training_notes(header)
    if config is None and os.path.isfile(file.with_name(_CONFIG)):
        notes.append(f"{_CONFIG} in the file's folder was not read. Give the folder to read it.")
    numbers = _number_entries(header, pairs, unlawful)
    other = tuple(name for name in left if name not in numbers)
    return Survey(
        tuple(factors),
        other,
        tuple(dict.fromkeys(notes)),
        looked_at=len(header.tensors),
        unsupported=unsupported(other),
    )


def _number_entries(header: Header, pairs: Iterable[FilePair], unlawful: Iterable[str]) -> set[str]:
    """Return the entries that are numbers of adapters, and not parameters of the model."""
    entries = {entry for pair in pairs for entry, _ in pair.numbers.values()}
    for name in unlawful:  # such as x.hada_w1_a
        entries.add(f"{name.removesuffix('.weight').rpartition('.')[0]}.alpha")
    return set(filter(header.is_scalar, entries))


def _training_notes(header: Header) -> Iterator[str]:
    keys = [f"ss_{name}" for name in _TRAINING.split()]
    entries = [f"{key} {shown(header.metadata[key])}" for key in keys if key in header.metadata]
    if entries:
        yield f"Its metadata has {', '.join(entries)}."


# --- the file -------------------------------------------------------------------------------------


def adapter_file(path: str | Path) -> Path:
    """Return the safetensors file that `inspect_file` reads: `path`, or the one in that folder."""
    return _file_at(Path(path))[0]


def _file_at(path: Path) -> tuple[Path, AdapterConfig | None]:
    """Return the safetensors file, `path` or the one in that folder, and the folder's configuration
    if there is one.
    """
    if not os.path.isdir(path):
        _refuse_pickles([path])
        return path, None
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InspectionError(
            f"{path} cannot be read: {error}.", "Give a folder that you may read."
        ) from error
    config = read_config(path / _CONFIG) if _CONFIG in names else None
    files = [name for name in names if name.endswith(".safetensors")]
    if _WEIGHTS in files and (config is not None or len(files) == 1):
        return path / _WEIGHTS, config
    if len(files) == 1:
        return path / files[0], config
    if not files:
        _refuse_pickles(path / name for name in names)
    lacking = f" and no {_CONFIG}" if config is None else f", none of them {_WEIGHTS}"
    raise InspectionError(
        f"{path} has {len(files)} .safetensors files{lacking}.",
        "Give one .safetensors file, or a folder saved by PEFT.",
    )


def _refuse_pickles(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix.lower() in _PICKLES:
            raise InspectionError(
                f"{path} is a pickle by its name. Reading a pickle can run any code in it.",
                "Save the adapter as .safetensors.",
            )


# --- readings -------------------------------------------------------------------------------------


def _factors(
    header: Header, file_pair: FilePair, init: Init | None, notes: list[str]
) -> Iterator[Factor]:
    pair, config = file_pair.pair, file_pair.declared.config
    reading = _reading(header, file_pair)
    scaling = _scaling(header, file_pair, reading)
    if scaling is None:
        notes.append("The file and its folder have no alpha: scaling 1 is assumed.")
    init = init or pair.convention.init
    declared = None if config is None else config.values.get("init_lora_weights")
    if init is None and declared is not None:
        init = declared_init(declared, reading.kind or "linear")
    return factors_of(pair, (pair.a.name, pair.b.name), reading, scaling, init or "unknown")


def _reading(header: Header, file_pair: FilePair) -> Reading:
    """Return a pair's reading, by the first of the row's layouts that fits both shapes and the
    declared rank.
    """
    pair = file_pair.pair
    rank: float | None = file_pair.declared.rank
    readings = [] if pair.is_sharded else list(readings_of(pair))
    readings = [reading for reading in readings if reading.fan_in > 0 and reading.fan_out > 0]
    if not readings:
        raise InspectionError(
            f"{header.path}: {pair.a.name} has shape {pair.a.shape} and {pair.b.name}"
            f" {pair.b.shape}, which is not a LoRA pair.",
            "Save the adapter again, or register its layout with register_convention().",
        )
    source = f"{getattr(file_pair.declared.config, 'where', '')} declares {rank}. @ r"
    attribute = file_pair.first_number(pair.convention.rank)
    if attribute is not None:
        entry, rank = file_pair.numbers[attribute]
        source = f"{entry} is {rank:g}."
    reading = next((reading for reading in readings if reading.rank_a == rank), readings[0])
    is_pruned = reading.kind == "adalora" and reading.rank_a < (rank or 0)
    if rank not in (None, reading.rank_a) and not is_pruned:
        raise InspectionError(
            f"{header.path}: {pair.a.name} has rank {reading.rank_a:g} by its shape"
            f" {pair.a.shape}, but {source}",
            "Use the configuration and the file of the same adapter.",
        )
    return reading


def _scaling(header: Header, file_pair: FilePair, reading: Reading) -> float | None:
    """Return the multiplier of B·A from the file's numbers, the configuration or kohya's metadata,
    else None.
    """
    row, declared, rank = file_pair.pair.convention, file_pair.declared, reading.rank_a
    name = file_pair.first_number((*row.scaling, *row.alpha))
    if name is not None:
        source, value = file_pair.numbers[name]
    elif declared.config is not None:
        return None if declared.alpha is None else declared.config.scaling(declared.alpha, rank)
    elif reading.kind == "linear" and row.a.endswith("down"):  # not conv_alpha
        source, value = "ss_network_alpha in its metadata", _network_alpha(header)
    else:
        return None
    if value is None:
        return None
    if not is_alpha(value):
        raise InspectionError(
            f"{header.path}: {source} is {shown(value)}.", "Save the adapter with a positive alpha."
        )
    return value if name in row.scaling else value / rank


def _network_alpha(header: Header) -> Any:
    """Return kohya's alpha, as a number if it is one. "None" and "Dynamic" are its words for a
    missing alpha.
    """
    value = header.metadata.get("ss_network_alpha")
    if value in (None, "None", "Dynamic"):
        return None
    with suppress(ValueError):
        return float(value)
    return value
