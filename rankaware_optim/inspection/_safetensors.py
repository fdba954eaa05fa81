"""The header of a safetensors file: names, shapes, metadata and alphas."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import InspectionError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The contents of a file: shapes by name, in the file's order, its table of strings, and the
    values of entries of one element that are called `alpha`.
    """

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    alphas: Mapping[str, float]


def read_header(path: Path) -> Header:
    """Read a file's header and its alphas. The other tensors are not loaded.

    Raises:
        InspectionError: the file is not regular, is cut short, has another format, or its header
            does not describe it.
    """
    if not os.path.isfile(path):  # a named pipe would be waited for
        raise InspectionError(
            f"There is no file {path}.", "Give a PEFT folder or a .safetensors file."
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        alphas = _alphas(path, slices)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise InspectionError(
            f"{path} is not a complete safetensors file, or has no usable header:"
            f" {why[:200]}.",
            "Copy it again, or give another file.",
        ) from error
    return Header(path, shapes, metadata, alphas)


def _alphas(path: Path, slices: Mapping[str, Any]) -> dict[str, float]:
    names = [n for n, each in slices.items() if each.get_shape() in ([], [1])]
    names = [name for name in names if name.rpartition(".")[2] == "alpha"]
    dtypes = {slices[name].get_dtype() for name in names}
    # NumPy has no bfloat16, and torch is slow to import
    with safe_open(path, framework="pt" if "BF16" in dtypes else "np") as file:
        return {name: float(file.get_tensor(name).item()) for name in names}
