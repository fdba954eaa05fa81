"""`inspect_file`: the LoRA pairs of an adapter on disk, a PEFT folder or a .safetensors file.

Only the file's header and numbers such as alpha are read. Each layer of the file becomes a
`StoredLayer`, with its tensors, alpha and the values of PEFT's configuration as attributes. So the
code that reads modules reads files too.
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
class StoredTensor:
    """A tensor in a file. Only its shape is read.

    is_half: whether it is LoRA's A or B by its name.
    """

    shape: Shape
    is_half: bool = False
    is_meta = requires_grad = True

    @property
    def weight(self) -> StoredTensor:
        """The tensor itself, because A may be a parameter or a module, and a file does not show
        which.
        """
        return self


# `StoredTensor` by name, but a float where a tensor of one element is a number such as alpha.
Tensors = dict[str, Any]


def inspect_file(path: str | Path, *, init: Init | None = None) -> Survey:
    """Find the LoRA pairs of an adapter on disk. Nothing is unpickled, and no weights are loaded.

    The same conventions are tried as for models, registered ones included. Rank, fan-in and fan-out
    come from the shapes. The rank must agree with the configuration, if there is one. The scaling
    comes from the file's `alpha` or from the configuration, which is PEFT's or its copy in a
    diffusers file. Without either, 1 is assumed, with a note. A stored adapter is usually trained,
    so its values do not show the init: it is the declared one or "unknown". The survey of an
    adapter without a law, such as LoHa, contains only other parameters.

    Args:
        path: a .safetensors file, or a folder with one and with PEFT's adapter_config.json.
        init: the init of all pairs, if it is not the declared one, as after `initialize`. Values as
            for `inspect_model`.

    Returns:
        The survey of the adapter.

    Raises:
        InspectionError: the file is missing, damaged or contradicts itself. The message names the
            file and the key.
    """
    check_init(init, known=INITS)
    file, config = _file_at(Path(path))
    with usable(str(file)):
        if not os.path.isfile(file):  # opening a named pipe would wait forever
            raise OSError("there is no such file")
        tensors, metadata = _read(file)
    configs = [config] if config else embedded_configs(file, metadata)
    survey = read_survey(_walk(file, tensors, configs), init=init)
    for name in survey.other:
        if tensors[name].is_half:
            raise InspectionError(
                f"{file}: {name} has no counterpart: the other matrix of its pair is missing, or"
                " another tensor has its place.",
                "Save the adapter again.",
            )
    if config and not config.r:  # another method of PEFT
        note = f"The adapter in this folder is {config.peft_type}, which no law covers."
        return replace(survey, notes=(*survey.notes, note))
    if not survey.has_adapter:
        raise InspectionError(
            f"{file} has no LoRA pair among its {len(tensors)} tensors.",
            "Pass an adapter's file, not a base model's.",
        )
    return survey


def _file_at(path: Path) -> tuple[Path, AdapterConfig | None]:
    """Return the .safetensors file at a path or in the folder there, and the folder's configuration
    if it has one.
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
            f"{path} has {len(files)} .safetensors files, and none of them is PEFT's {_WEIGHTS}"
            f" beside {_CONFIG}.",
            "Pass one .safetensors file, or a folder that PEFT saved. Pickles (.bin, .pt, .ckpt)"
            " are not read, because they can run any code: save the adapter as .safetensors.",
        )
    return files[0], config


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return a file's tensors and its metadata. Only numbers such as alpha are loaded."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
    halves, others = _known_names()
    tensors: Tensors = {}
    names = []
    for name, each in slices.items():
        shape = tuple(each.get_shape())
        tensors[name] = StoredTensor(shape)
        attribute = name.rpartition(".")[2]
        # An `alpha` of more entries is a parameter of the base model.
        if shape in ((), (1,)) and attribute in others - halves:
            names.append(name)
    dtypes = {slices[name].get_dtype() for name in names}
    # NumPy has no bfloat16. torch reads it, but is slow to import.
    with safe_open(path, framework="pt" if "BF16" in dtypes else "np") as file:
        for name in names:
            tensors[name] = float(file.get_tensor(name).item())
    return tensors, metadata


def _known_names() -> tuple[set[str], set[str]]:
    """Return the attributes that hold A or B, and all others that the conventions ask for."""
    halves = set[str]()
    others = set[str]()
    for row in conventions():
        halves |= {row.a, row.b}
        others |= {*row.where, *row.without, *row.rank, *row.scaling, *row.alpha}
    return halves, others


def _walk(path: Path, tensors: Tensors, configs: Sequence[AdapterConfig]) -> Walk:
    """Return the layers of a file in place of modules, and its tensors in place of parameters."""
    halves, others = _known_names()
    known = "|".join(map(re.escape, halves | others))
    # The layer's name, the attribute, and the adapter's name, which may be missing.
    place = re.compile(rf"(?:(.*)\.)?({known})(?:\.([^.]+))?")
    layers: dict[str, Any] = {}
    parameters: list[Any] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, StoredTensor):
            parameters.append((name, tensor))
        match = place.fullmatch(name.removesuffix(".weight"))
        if match is None:
            continue
        owner, attribute, adapter = match.groups("")
        layer = StoredLayer(owner, f"{path}: {owner}")
        # Names with and without PEFT's prefix are of one layer, so a pair stored twice is noticed.
        place_of_layer = owner.removeprefix(_PREFIX)
        layer = layers.setdefault(place_of_layer, layer)
        if attribute in others:
            setattr(layer, attribute, tensor)
        # A bias, or a slice of DyLoRA, is not A or B.
        is_part = adapter == "bias" or adapter.isdecimal()
        if attribute in halves and not is_part:
            # A name such as `down` alone is no sign of an adapter.
            tensor.is_half = "lora" in name
            half = Half(name, tensor)
            layer.halves.setdefault((attribute, adapter), half)
    modules = []
    for layer in layers.values():
        declare(layer, configs)
        modules.append((layer.name, layer))
    return Walk(modules, parameters)
