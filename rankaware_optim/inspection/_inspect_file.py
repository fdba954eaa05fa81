"""Surveys of adapter files, PEFT folders or .safetensors files. Only headers are read, and no
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from .._checks import check_init
from .._types import Factor, Init, Survey
from ..errors import InspectionError
from ._file_pairs import FilePair, file_pairs
from ._pairs import reading_of, scaling_of
from ._peft_config import LORA_TYPES, AdapterConfig, read_config
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
    pairs, numbers = file_pairs(header, config)
    factors, notes = list[Factor](), list[str]()
    for pair, declared in pairs:
        factors += _factors(pair, declared.config, init, notes)
    left = header.tensors.keys() - {f.name for f in factors}
    unlawful = set(filter(is_other_adapter, left))
    kind = None if config is None else config.values.get("peft_type")
    if kind in LORA_TYPES and not factors and not unlawful:
        raise InspectionError(
            f"{file} has no LoRA pair among {len(header.tensors)} tensors.",
            "Give an adapter's file, not a base model's.",
        )
    notes += _file_notes(header, config, kind)
    for name in unlawful:  # such as x.hada_w1_a
        numbers.add(f"{name.removesuffix('.weight').rpartition('.')[0]}.alpha")
    left -= {name for name in numbers if header.is_scalar(name)}
    other = tuple(name for name in header.tensors if name in left)
    return Survey(
        tuple(factors),
        other,
        tuple(dict.fromkeys(notes)),
        looked_at=len(header.tensors),
        unsupported=unsupported(other),
    )


def _file_notes(
    header: Header, config: AdapterConfig | None, kind: Any
) -> Iterator[str]:
    if kind not in LORA_TYPES:
        yield f"The folder's adapter is {kind}, which no law covers."
    keys = [f"ss_{name}" for name in _TRAINING.split()]
    entries = [
        f"{key} {shown(header.metadata[key])}" for key in keys if key in header.metadata
    ]
    if entries:
        yield f"Its metadata has {', '.join(entries)}."
    if config is None and os.path.isfile(header.path.with_name(_CONFIG)):
        yield f"{_CONFIG} in the file's folder was not read. Give the folder to read it."


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
    if not files:
        _refuse_pickles(path / name for name in names)
    if config is not None and _WEIGHTS in files:
        files = [_WEIGHTS]
    if len(files) == 1:
        return path / files[0], config
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


def _factors(
    pair: FilePair, config: AdapterConfig | None, init: Init | None, notes: list[str]
) -> Iterator[Factor]:
    reading = reading_of(pair)
    scaling = scaling_of(pair, reading.rank_a)
    if scaling is None:
        notes.append("The file and its folder have no alpha: scaling 1 is assumed.")
    init = init or pair.convention.init
    declared = None if config is None else config.values.get("init_lora_weights")
    if init is None and declared is not None:
        init = declared_init(declared, reading.kind)
    return factors_of(
        pair, (pair.a.name, pair.b.name), reading, scaling, init or "unknown"
    )
