"""LoRA pairs in the header of a safetensors file, by the table of conventions that reads models.

A layer of a file owns its pairs as a module does. Its tensors, and what its alpha and PEFT's
configuration declare, are its attributes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import InspectionError
from ._conventions import CONVENTIONS, conventions
from ._pairs import Pair, match_rows
from ._peft_config import AdapterConfig
from ._stored import Half, Shape, Stored, StoredLayer

_PREFIX = "base_model.model."
# Tried last where no configuration says otherwise: a name without an adapter's is that of a plain
# library, as loralib's.
_DICTS = [row for row in CONVENTIONS if row.container and not row.where]
# DyLoRA's slices, which are no pair, have names such as lora_A.0.
_ADAPTER = re.compile(r"(?!(\d+|bias|weight)$)[^.]*")


# --- the header -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The contents of a file: shapes by name, in the file's order, its table of strings, and the
    values of entries of one element by which a convention declares numbers, such as `alpha`.
    """

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    numbers: Mapping[str, float]


def read_header(path: Path) -> Header:
    """Read a file's header and its alphas. The other tensors are not loaded.

    Raises:
        InspectionError: the file is not regular, is cut short, has another format, or its header
            does not describe it.
    """
    if not os.path.isfile(path):  # a named pipe would be waited for
        raise InspectionError(
            f"There is no file {path}.",
            "Give a PEFT folder or a .safetensors file, from the Hub after its download.",
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        numbers = _numbers(path, slices)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise InspectionError(
            f"{path} is not a complete safetensors file, or has no usable header:"
            f" {why[:200]}.",
            "Copy it again, or give another file.",
        ) from error
    return Header(path, shapes, metadata, numbers)


def _numbers(path: Path, slices: Mapping[str, Any]) -> dict[str, float]:
    declaring = {
        name for row in conventions() for name in (*row.rank, *row.scaling, *row.alpha)
    }
    names = [n for n, each in slices.items() if each.get_shape() in ([], [1])]
    names = [name for name in names if name.rpartition(".")[2] in declaring]
    dtypes = {slices[name].get_dtype() for name in names}
    # NumPy has no bfloat16, and torch is slow to import
    with safe_open(path, framework="pt" if "BF16" in dtypes else "np") as file:
        return {name: float(file.get_tensor(name).item()) for name in names}


# --- its layers -----------------------------------------------------------------------------------


def file_pairs(header: Header, configs: Sequence[AdapterConfig]) -> Iterator[Pair]:
    """Yield every pair of a file.

    Raises:
        InspectionError: one half is missing, or two tensors or pairs have the same place.
    """
    rows = conventions()
    plain_first = sorted(rows, key=_DICTS.__contains__)
    for layer in _layers(header).values():
        config = next((c for c in configs if layer.name.startswith(c.prefix)), None)
        if config:
            config.declare(layer)
        fitting = [row for row in (rows if config else plain_first) if row.fits(layer)]
        pairs = list(match_rows(layer.name, layer, fitting, layer.halves_of))
        _check_whole(header, layer, pairs)
        for pair in pairs:
            name = pair.convention.layer_in_file(layer.name)
            yield pair._replace(layer=name)


def _check_whole(header: Header, layer: StoredLayer, pairs: Sequence[Pair]) -> None:
    """Raise if two pairs are of one adapter, which a name without one may be, or a half is left."""
    adapters = {pair.adapter for pair in pairs}
    if len(pairs) > 1 and ("" in adapters or len(adapters) < len(pairs)):
        raise _collision(header, pairs[0].a.name, pairs[1].a.name)
    whole = {half.name for pair in pairs for half in (pair.a, pair.b)}
    for half in layer.halves.values():
        if half.name not in whole and "lora" in half.name:
            raise InspectionError(
                f"{header.path}: {half.name} lacks the other half of its LoRA pair.",
                "Save the adapter again.",
            )


def _layers(header: Header) -> dict[str, StoredLayer]:
    """Return the layers of a file, by name without PEFT's prefix."""
    rows = conventions()
    halves = {name for row in rows for name in (row.a, row.b)}
    known = halves | {name for row in rows for name in (*row.where, *row.without)}
    layers: dict[str, StoredLayer] = {}
    for name, shape in header.shapes.items():
        owner, attribute, adapter = _place(name, known)
        layer = StoredLayer(owner, f"{header.path}: {owner}")
        layer = layers.setdefault(owner.removeprefix(_PREFIX), layer)
        if attribute in halves and _ADAPTER.fullmatch(adapter):
            half = Half(name, Stored(shape))
            first = layer.halves.setdefault((attribute, adapter), half)
            if first is not half:
                raise _collision(header, first.name, name)
        else:
            tensor = SimpleNamespace(weight=Stored(shape))
            vars(layer)[attribute] = header.numbers.get(name, tensor)
    return layers


def _place(name: str, known: Container[str]) -> tuple[str, str, str]:
    """Return a tensor's owner, its attribute there, the last one that is known, and the rest."""
    parts = name.removesuffix(".weight").split(".")
    places = [i for i, part in enumerate(parts) if part in known]
    start = places[-1] if places else len(parts) - 1
    return ".".join(parts[:start]), parts[start], ".".join(parts[start + 1 :])


def _collision(header: Header, one: str, other: str) -> InspectionError:
    return InspectionError(
        f"{header.path}: {one} and {other} collide: both belong to one layer's pair.",
        "Save the adapter again.",
    )
