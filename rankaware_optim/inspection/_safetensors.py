"""The header of a safetensors file: names, shapes and numbers, checked against the file's size."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import InspectionError

_LIMIT = 25_000_000  # bytes, enough for about 150,000 tensors; the format itself allows 100 million
_NAME_LIMIT = 1000
_CODES = {
    "F16": "<e",
    "F32": "<f",
    "F64": "<d",
    "I8": "<b",
    "I16": "<h",
    "I32": "<i",
    "I64": "<q",
}
_CODES |= {"U8": "<B", "U16": "<H", "U32": "<I", "U64": "<Q", "BF16": "<f"}


class Tensor(NamedTuple):
    """One tensor's entry: dtype, shape, and where its bytes begin and end in the file. Its values
    are not read, as on torch's meta device.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    is_meta: bool = True


@dataclass(frozen=True)
class Header:
    """The contents of a safetensors file by name, in the header's order. metadata: its table of
    strings. numbers: the values of tensors of one element.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    numbers: Mapping[str, float]

    def is_scalar(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].shape in ((), (1,))

    def number(self, name: str) -> float:
        """Return the value of a tensor of one element, in any real dtype of 16 bits or more.

        Raises:
            InspectionError: the dtype is another one.
        """
        if name not in self.numbers:
            raise InspectionError(
                f"{self.path}: {name} of dtype {self.tensors[name].dtype} cannot be read as a"
                " number.",
                "Save it as a float of 16, 32 or 64 bits.",
            )
        return self.numbers[name]


def read_header(path: Path) -> Header:
    """Read a file's header: eight bytes of length, then JSON of at most 25 MB. Its tensors must
    fill the rest exactly.

    Raises:
        InspectionError: the file is not regular, is cut short, has another format, or its header
            does not describe it.
    """
    if not os.path.isfile(path):
        raise InspectionError(
            f"There is no file {path}.", "Give a PEFT folder or a .safetensors file."
        )
    try:
        with path.open("rb", buffering=0) as file:
            first, size = file.read(8), os.fstat(file.fileno()).st_size
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= size - 8:
                raise InspectionError(
                    f"{path} is not a complete safetensors file.",
                    "Copy it again, or give another file.",
                )
            if length > _LIMIT:
                raise InspectionError(
                    f"{path} has a header of {length} bytes, above this reader's {_LIMIT}.",
                    "Give an adapter's own file.",
                )
            # safe_open would accept a duplicate key
            document = parse_json(file.read(length))
            # "pt" would reserve memory for the whole file
            with safe_open(path, framework="np"):
                pass
            metadata = document.pop("__metadata__", {})
            tensors = {
                name: _tensor(path, name, document[name], 8 + length)
                for name in document
            }
            numbers = dict(_numbers(file, tensors))
    except InspectionError:
        raise
    except SafetensorError as error:
        why = one_line(str(error).removeprefix("Error while deserializing header: "))
        raise InspectionError(
            f"{path} is not a complete safetensors file, or has no usable header: {why}.",
            "Copy it again, or give another file.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InspectionError(
            f"{path} cannot be read: {error}.",
            "Give a PEFT folder or a .safetensors file.",
        ) from error
    if metadata is None:
        raise InspectionError(
            f"{path}: __metadata__ is not a table of strings.",
            "Save the adapter again.",
        )
    return Header(path, tensors, metadata, numbers)


def _tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    if not name.isprintable() or len(name) > _NAME_LIMIT:
        raise InspectionError(
            f"{path}: a tensor is called {shown(name)}.",
            f"Give every tensor a name of at most {_NAME_LIMIT} printable characters.",
        )
    # safe_open reads lists and enums too.
    if not isinstance(entry, dict) or not isinstance(entry["dtype"], str):
        raise InspectionError(
            f"{path} has no usable header: {name} is not an entry.",
            "Save the adapter again.",
        )
    begin, end = entry["data_offsets"]
    return Tensor(entry["dtype"], tuple(entry["shape"]), start + begin, start + end)


def _numbers(
    file: IO[bytes], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    for name, tensor in tensors.items():
        code = _CODES.get(tensor.dtype)
        if code is None or tensor.shape not in ((), (1,)):
            continue
        file.seek(tensor.begin)
        data = file.read(tensor.end - tensor.begin)
        if tensor.dtype == "BF16":  # the upper half of a float32
            data = b"\0\0" + data
        if len(data) == struct.calcsize(code):
            yield name, float(struct.unpack(code, data)[0])


def parse_json(text: bytes) -> Any:
    """Parse UTF-8 JSON without duplicate keys. Raise a ValueError or RecursionError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document: dict[str, Any] = {}
        for key, value in pairs:
            if key in document:
                raise ValueError(f"the key {shown(key)} occurs twice")
            document[key] = value
        return document

    return json.loads(text.decode("utf-8"), object_pairs_hook=unique)


def shown(value: object) -> str:
    """Return a value from a file for an error message: one short line of printable characters."""
    if not isinstance(value, (str, int, float, type(None))):
        return f"a {type(value).__name__}"
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def one_line(text: str) -> str:
    """Return the last line of an error's text, printable and short."""
    return ascii(text.strip().rpartition("\n")[2][:200])[1:-1]
