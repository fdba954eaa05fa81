"""This module finds the LoRA pairs of an adapter file or of a folder that PEFT has
saved.

Only the header of the file and single numbers such as alpha are read. Each layer of the
file becomes a `StoredLayer`, whose attributes are the tensors, alpha, and the values of
PEFT's configuration. The same code can therefore inspect adapter files and modules.
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
    """The shape of a tensor in an adapter file, whose values are not read.

    Args:
        shape: the shape of the tensor.
        is_half: whether the tensor is a LoRA matrix A or B, according to its name.
    """

    shape: Shape
    is_half: bool = False
    is_meta = requires_grad = True

    @property
    def weight(self) -> StoredTensor:
        """The tensor itself.

        In a model, A can be a parameter or a module with a `weight`. A file does not
        show which of the two A was, so a `StoredTensor` can be used as a parameter and
        as a module.
        """
        return self


# The values are of type `StoredTensor`, or float for single numbers such as alpha.
Tensors = dict[str, Any]


def inspect_file(path: str | Path, *, init: Init | None = None) -> Survey:
    """Find the LoRA pairs of an adapter that is stored on disk.

    The function loads no weights and reads no pickle files. It uses the same
    conventions as for models, including the conventions that the user registered. The
    rank, the fan-in and the fan-out are read from the shapes. If PEFT's configuration
    declares a rank, it must agree with the shapes.

    The scaling is computed from the `alpha` in the file, or from PEFT's configuration
    in the folder or in the file's metadata. If none of these contains alpha, a
    scaling of 1 is assumed and a note is added to the survey. The values of a
    trained adapter do not show which matrix started at zero, so the init is read from
    the configuration. If the configuration does not contain an init, the result is
    "unknown".

    For an adapter without a scaling law, such as LoHa, the survey contains only the
    names of the parameters, in `other`.

    Args:
        path: a .safetensors file, or a folder that contains one. The folder may also
            contain PEFT's adapter_config.json.
        init: the init of all pairs, if it differs from the configuration, for example
            after `initialize`. The values are the same as for `inspect_model`.

    Returns:
        A survey of the adapter.

    Raises:
        InspectionError: the file does not exist, is damaged, or contains values that
            contradict each other. The message names the file and the tensor.
    """
    check_init(init, known=INITS)
    file, config = _file_at(Path(path))
    with usable(str(file)):
        # The check also excludes named pipes, because opening one would wait forever.
        if not os.path.isfile(file):
            raise OSError("There is no regular file at this path")
        tensors, metadata = _read(file)
    configs = [config] if config else embedded_configs(file, metadata)
    survey = read_survey(_walk(file, tensors, configs), init=init)
    for name in survey.other:
        if tensors[name].is_half:
            raise InspectionError(
                f"{file} contains the LoRA matrix {name}, but the other matrix of this pair is"
                " missing, or one of the two is stored twice.",
                "Save the adapter again, so that the file contains A and B of every layer once.",
            )
    # The rank in the configuration is 0 if its PEFT method is not LoRA.
    if config and not config.r:
        note = (
            f"The adapter in this folder uses the PEFT method {config.peft_type}, which no"
            " scaling law covers."
        )
        return replace(survey, notes=(*survey.notes, note))
    if not survey.has_adapter:
        raise InspectionError(
            f"No LoRA pair was found among the {len(tensors)} tensors of {file}.",
            "Pass the file of an adapter instead of the file of a base model.",
        )
    return survey


def _file_at(path: Path) -> tuple[Path, AdapterConfig | None]:
    """Find the .safetensors file and PEFT's configuration at a path.

    If the path is a file, or the folder has no configuration, the configuration is
    None.
    """
    if not os.path.isdir(path):
        return path, None
    config = None
    if os.path.lexists(path / _CONFIG):
        config = read_config(path / _CONFIG)
    files = sorted(path.glob("*.safetensors"))
    if config and path / _WEIGHTS in files:
        files = [path / _WEIGHTS]
    if not files:
        raise InspectionError(
            f"The folder {path} contains no .safetensors file.",
            "Pass a folder that contains an adapter in the .safetensors format. Pickle files (.bin,"
            " .pt, .ckpt) are not read, because they can execute code. If you have such a file,"
            " save the adapter as .safetensors.",
        )
    if len(files) > 1:
        raise InspectionError(
            f"The folder {path} contains {len(files)} .safetensors files, so it is unclear which of"
            " them is the adapter.",
            "Pass the path of one of these files.",
        )
    return files[0], config


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Only the shapes of the tensors are read, and the values of single numbers such as
    alpha.
    """
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
        # A tensor that is called `alpha` and has more than one entry is not LoRA's
        # alpha. Such a tensor is a trained parameter, so it is not loaded.
        if shape in ((), (1,)) and attribute in others - halves:
            names.append(name)
    dtypes = {slices[name].get_dtype() for name in names}
    # NumPy cannot read bfloat16. torch can, but importing torch takes seconds, so it is
    # only used if necessary.
    with safe_open(path, framework="pt" if "BF16" in dtypes else "np") as file:
        for name in names:
            tensors[name] = float(file.get_tensor(name).item())
    return tensors, metadata


def _known_names() -> tuple[set[str], set[str]]:
    """Collect the attribute names that appear in any convention.

    Returns:
        The names of the attributes that contain A or B, and the names of all other
        attributes.
    """
    halves = set[str]()
    others = set[str]()
    for row in conventions():
        halves |= {row.a, row.b}
        others |= {*row.where, *row.without, *row.rank, *row.scaling, *row.alpha}
    return halves, others


def _walk(path: Path, tensors: Tensors, configs: Sequence[AdapterConfig]) -> Walk:
    """Arrange the tensors of a file like the modules and parameters of a model.

    In the result, each module is represented by a `StoredLayer`, and each parameter by
    a tensor of the file.
    """
    halves, others = _known_names()
    known = "|".join(map(re.escape, halves | others))
    # A tensor name consists of the layer's name, the attribute and the adapter's name.
    # The first and the last of these may be missing.
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
        # Names with and without PEFT's prefix refer to the same layer. Without this
        # step, a pair that is stored under both names would not be noticed.
        place_of_layer = owner.removeprefix(_PREFIX)
        layer = layers.setdefault(place_of_layer, layer)
        if attribute in others:
            setattr(layer, attribute, tensor)
        # A name such as `lora_A.bias` or DyLoRA's `lora_A.3` is not the matrix A.
        is_part = adapter == "bias" or adapter.isdecimal()
        if attribute in halves and not is_part:
            # Names such as `down` also occur in base models, so only names with "lora"
            # show for certain that a tensor is part of an adapter.
            tensor.is_half = "lora" in name
            half = Half(name, tensor)
            layer.halves.setdefault((attribute, adapter), half)
    modules = []
    for layer in layers.values():
        declare(layer, configs)
        modules.append((layer.name, layer))
    return Walk(modules, parameters)
