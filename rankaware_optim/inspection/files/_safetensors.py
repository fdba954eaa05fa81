"""The header of a safetensors file, held against the file's size: names, shapes and places; no tensor is loaded."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from ...errors import InspectionError

__all__ = ["Header", "Shape", "Tensor", "parse_json", "read_header", "shown"]

Shape = tuple[int, ...]

_LIMIT = 25_000_000  # bytes, as of some 150,000 tensors; the format itself allows 100 million
_NAME_LIMIT = 1000
_BITS = {"BOOL": 8, "BF16": 16, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F16": 16, "F32": 32, "F64": 64, "C64": 64}
_BITS |= {f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)}
_BITS |= {f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
_CODES = {"F16": "<e", "F32": "<f", "F64": "<d", "I8": "<b", "I16": "<h", "I32": "<i", "I64": "<q"}
_CODES |= {"U8": "<B", "U16": "<H", "U32": "<I", "U64": "<Q"}


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry: dtype, shape, and where its bytes begin and end in the file."""

    dtype: str
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, by name, in the header's order; `metadata` is its table of strings."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def scalars(self, names: Iterable[str]) -> dict[str, float]:
        """The values of tensors of one element, in any real dtype of 16 bits or more: each is sought and read alone.

        Raises:
            InspectionError: a dtype that holds no such number, or a file that has become shorter.
        """
        wanted = list(names)
        if not wanted:
            return {}
        try:
            with self.path.open("rb", buffering=0) as file:
                return {name: self._scalar(file, name) for name in wanted}
        except OSError as error:
            raise InspectionError(f"{self.path} cannot be read: {error}.", "Copy the file again.") from error

    def _scalar(self, file: BinaryIO, name: str) -> float:
        tensor = self.tensors[name]
        file.seek(tensor.begin)
        data = file.read(tensor.end - tensor.begin)
        code = _CODES.get(tensor.dtype)
        if tensor.dtype == "BF16":  # the upper half of a float32
            code, data = "<f", b"\0\0" + data
        if code is None or len(data) != struct.calcsize(code):
            raise InspectionError(
                f"{self.path}: {name} of dtype {tensor.dtype} cannot be read as a number.",
                "Save it as a float of 16, 32 or 64 bits.",
            )
        return float(struct.unpack(code, data)[0])


def read_header(path: Path) -> Header:
    """A file's header: eight bytes of length, then JSON of at most 25 MB whose tensors fill the rest exactly.

    Raises:
        InspectionError: no regular file, one cut short, of another format, or whose header does not describe it.
    """
    if not os.path.isfile(path):
        raise InspectionError(f"There is no file {path}.", "Give a PEFT folder or a .safetensors file.")
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            text = file.read(_length(path, file.read(8), size))
        document = parse_json(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InspectionError):
            raise
        raise InspectionError(
            f"{path} cannot be read: {error}.", "Give a PEFT folder or a .safetensors file."
        ) from error
    if not isinstance(document, dict):
        raise InspectionError(f"{path} has no usable header: it is no JSON object.", "Save the adapter again.")
    metadata = _metadata(path, document.pop("__metadata__", {}))
    start = 8 + len(text)
    tensors = {_name(path, name): _tensor(path, name, entry, start) for name, entry in document.items()}
    _check_places(path, tensors, start, size)
    return Header(path, tensors, metadata)


def _length(path: Path, first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= size - 8:
        raise InspectionError(f"{path} is no whole safetensors file.", "Copy it again, or give another.")
    if length > _LIMIT:
        raise InspectionError(
            f"{path} has a header of {length} bytes, above this reader's {_LIMIT}.", "Give an adapter's own file."
        )
    return length


def parse_json(text: bytes) -> Any:
    """UTF-8 JSON in which no key comes twice; a ValueError or RecursionError says what is wrong."""
    return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} comes twice")
    return made


def shown(value: object) -> str:
    """A value from a file as an error shows it: one short line of printable characters."""
    if not isinstance(value, (str, int, float, type(None))):
        return f"a {type(value).__name__}"
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _metadata(path: Path, metadata: object) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InspectionError(f"{path}: __metadata__ is no table of strings.", "Save the adapter again.")
    return metadata


def _name(path: Path, name: str) -> str:
    if not name.isprintable() or len(name) > _NAME_LIMIT:
        raise InspectionError(
            f"{path}: a tensor is called {shown(name)}.",
            f"Give every tensor a name of at most {_NAME_LIMIT} printable characters.",
        )
    return name


def _tensor(path: Path, name: str, entry: object, start: int) -> Tensor:
    """An entry with counts for a shape and a place that has room for just that many elements."""
    found: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (_are_counts(shape) and _are_counts(place) and len(place) == 2 and place[0] <= place[1]):
        raise InspectionError(f"{path}: {name} has no usable shape or place.", "Save the adapter again.")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InspectionError(f"{path}: {name} has the unknown dtype {shown(dtype)}.", "Save the adapter again.")
    if math.prod(shape) * _BITS[dtype] != 8 * (place[1] - place[0]):
        raise InspectionError(
            f"{path}: {name} of shape {tuple(shape)} and dtype {dtype} cannot fill its {place[1] - place[0]} bytes.",
            "Save the adapter again.",
        )
    return Tensor(dtype, tuple(shape), start + place[0], start + place[1])


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_places(path: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """The tensors lie one after another, without a hole or an overlap, up to the file's end."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            what = "overlaps the tensor before it" if tensor.begin < end else "begins after a hole"
            raise InspectionError(f"{path}: {name} {what}.", "Save the adapter again.")
        end = tensor.end
    if end != size:
        raise InspectionError(
            f"{path} is no whole safetensors file: {end - start} bytes of tensors belong after its header, "
            f"{size - start} are there.",
            "Copy it again.",
        )
