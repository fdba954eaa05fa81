"""Surveys of adapter files: PEFT folders or .safetensors files. Only headers are read, and no
tensors but alphas.

A file is read as a model: a layer owns its pairs as a module does, and its tensors, and what its
alpha and PEFT's configuration declare, are its attributes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .._checks import check_init
from .._types import Init
from ..errors import InspectionError
from ._conventions import INITS, Shape, StoredLayer, conventions
from ._pairs import Half, Walk
from ._peft_config import (
    AdapterConfig,
    declare,
    embedded_configs,
    read_config,
    usable,
)
from ._record import Survey
from ._survey import read_survey

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(eq=False)
class Stored:
    """A tensor in a file, of which the shape is known.

    is_half: whether its name is that of one of LoRA's factors.
    """

    shape: Shape
    is_half: bool = False
    is_meta = requires_grad = True

    @property
    def weight(self) -> Stored:
        """Itself, since a file does not tell a parameter from a module of one."""
        return self


Tensors = dict[str, Any]  # those of one element that declare something are floats


def inspect_file(path: str | Path, *, init: Init | None = None) -> Survey:
    """Find the LoRA pairs of an adapter on disk. Nothing is unpickled, and no tensors are loaded.

    The conventions are those of models, registered ones too. Rank, fan-in and fan-out come from the
    shapes. The rank must agree with the one that a configuration declares. The scaling comes from
    the file's `alpha` or the configuration (PEFT's, or the copy in a diffusers file).
    Otherwise it is 1, with a note. The adapter is usually trained, so its init is the declared one,
    or "unknown". The survey of an adapter without a law, such as LoHa, has no factors.

    Args:
        path: a folder with PEFT's adapter_config.json and a .safetensors file, or one .safetensors
            file.
        init: the init of all pairs, as for `inspect_model`, if the declared one is not theirs, as
            after `initialize`.

    Raises:
        InspectionError: something is missing, damaged or contradictory. The message names the file
            and the key.
    """
    check_init(init, known=INITS)
    file, config = _file_at(Path(path))
    with usable(str(file)):
        if not os.path.isfile(file):  # a named pipe would be waited for
            raise OSError("there is no such file")
        tensors, metadata = _read(file)
    configs = [config] if config else embedded_configs(file, metadata)
    survey = read_survey(_walk(file, tensors, configs), init=init)
    for name in survey.other:
        if tensors[name].is_half:
            raise InspectionError(
                f"{file}: {name} has no other half, or another tensor has its place.",
                "Save the adapter again.",
            )
    if config and not config.r:
        note = f"The folder's adapter is {config.peft_type}, which no law covers."
        return replace(survey, notes=(*survey.notes, note))
    if not survey.has_adapter:
        raise InspectionError(
            f"{file} has no LoRA pair among {len(tensors)} tensors.",
            "Give an adapter's file, not a base model's.",
        )
    return survey


def _file_at(path: Path) -> tuple[Path, AdapterConfig | None]:
    """Return the safetensors file, `path` or the one in that folder, and the folder's configuration
    if there is one.
    """
    if not os.path.isdir(path):
        return path, None
    config = None
    if os.path.lexists(path / _CONFIG):
        config = read_config(path / _CONFIG)
    files = sorted(path.glob("*.safetensors"))
    if config and path / _WEIGHTS in files:
        files = [path / _WEIGHTS]
    if len(files) != 1:
        raise InspectionError(
            f"{path} has {len(files)} .safetensors files, none of them PEFT's {_WEIGHTS} beside"
            f" {_CONFIG}.",
            "Give one .safetensors file, or a folder saved by PEFT. Pickles (.bin, .pt, .ckpt) are"
            " not read, since they can run any code: save the adapter as .safetensors.",
        )
    return files[0], config


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return a file's tensors and its table of strings. No tensors but numbers are loaded."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
    halves, others = _known_names()
    tensors: Tensors = {}
    names = []
    for name, each in slices.items():
        shape = tuple(each.get_shape())
        tensors[name] = Stored(shape)
        attribute = name.rpartition(".")[2]
        if shape in ((), (1,)) and attribute in others - halves:
            names.append(name)
    dtypes = {slices[name].get_dtype() for name in names}
    # NumPy has no bfloat16, and torch is slow to import
    with safe_open(path, framework="pt" if "BF16" in dtypes else "np") as file:
        for name in names:
            tensors[name] = float(file.get_tensor(name).item())
    return tensors, metadata


def _known_names() -> tuple[set[str], set[str]]:
    """Return the names of factors, and of what else a row looks for."""
    halves = set[str]()
    others = set[str]()
    for row in conventions():
        halves |= {row.a, row.b}
        others |= {*row.where, *row.without, *row.rank, *row.scaling, *row.alpha}
    return halves, others


def _walk(path: Path, tensors: Tensors, configs: Sequence[AdapterConfig]) -> Walk:
    """Return the layers of a file as modules, and its tensors but numbers as their parameters."""
    halves, others = _known_names()
    known = "|".join(map(re.escape, halves | others))
    place = re.compile(rf"(?:(.*)\.)?({known})(?:\.([^.]+))?")
    layers: dict[str, Any] = {}
    parameters: list[Any] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, Stored):
            parameters.append((name, tensor))
        match = place.fullmatch(name.removesuffix(".weight"))
        if match is None:
            continue
        owner, attribute, adapter = match.groups("")
        layer = StoredLayer(owner, f"{path}: {owner}")
        place_of_layer = owner.removeprefix(_PREFIX)
        layer = layers.setdefault(place_of_layer, layer)
        if attribute in others:
            setattr(layer, attribute, tensor)
        # DyLoRA's slices are no pair
        is_part = adapter == "bias" or adapter.isdecimal()
        if attribute in halves and not is_part:
            tensor.is_half = "lora" in name
            half = Half(name, tensor)
            layer.halves.setdefault((attribute, adapter), half)
    modules = []
    for layer in layers.values():
        declare(layer, configs)
        modules.append((layer.name, layer))
    return Walk(modules, parameters)
