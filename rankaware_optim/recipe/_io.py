"""The two files of a recipe: TOML for people, safetensors for arrays; checked at the door, written atomically."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tomli
import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .._checks import is_number, is_whole
from ..errors import RankAwareError, RecipeError

SCHEMA = 1


def write(path: str | os.PathLike[str], header: str, text: dict[str, Any], arrays: Mapping[str, torch.Tensor]) -> Path:
    """Write the TOML file `path` and the safetensors file beside it; a reader finds both or no recipe."""
    target = _toml_path(path)
    beside = target.with_suffix(".safetensors")
    data = save({key: value.contiguous() for key, value in arrays.items()})
    hashed = {"tensors": {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}}
    encoded = (header + tomli_w.dumps(_without_none({"schema": SCHEMA, **text, **hashed}))).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(beside, data) as tensors, staged(target, encoded) as toml:
            os.replace(tensors, beside)  # until the next line, the old text's hash refuses the new tensors
            os.replace(toml, target)
    except OSError as error:
        raise RecipeError(f"The recipe {target} cannot be written: {error}.", "Choose a writable folder.") from error
    return target


def read(path: str | os.PathLike[str]) -> tuple[Reader, dict[str, torch.Tensor]]:
    """Read both files: a `Reader` over the TOML, and the tensors, which match the hash in it."""
    target = _toml_path(path)
    take = Reader(_read_toml(target), target)
    return take, _read_tensors(target, take("tensors.file", str), take("tensors.sha256", str))


def _toml_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".toml":
        raise RecipeError(f"A recipe's file ends in .toml, {str(target)!r} does not.", "Name it so.")
    return target


@contextmanager
def staged(target: Path, data: bytes) -> Iterator[Path]:
    """`data` in a synced temporary file beside `target`, ready to replace it; removed if it did not."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


_MISSING: Any = object()
_KINDS = {dict: "table", list: "list", str: "text", bool: "true or false", int: "whole number", float: "number"}
T = TypeVar("T")


class Reader:
    """Takes values out of nested TOML by path, each checked, with the path in every error."""

    def __init__(self, data: Mapping[str, Any], target: Path) -> None:
        self._data, self._target = data, target

    def __call__(self, path: str, kind: type, default: Any = _MISSING) -> Any:
        value: Any = self._data
        for key in path.split("."):
            value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            if default is not _MISSING:
                return default
            raise self.error("lacks a value", path)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.error(f"holds {value!r} where a {_KINDS[kind]} belongs", path)
        return value

    def signed(self, path: str, default: Any = _MISSING) -> Any:
        """A finite number."""
        value = self(path, object, default)
        if value is not default and not (is_number(value) and abs(value) <= sys.float_info.max):
            raise self.error(f"holds {value!r} where a finite number belongs", path)
        return value

    def number(self, path: str, default: Any = _MISSING) -> Any:
        """A finite number that is not negative, as most in a recipe are."""
        value = self.signed(path, default)
        if value is not default and value < 0:
            raise self.error(f"holds {value!r} where a finite number belongs that is not negative", path)
        return value

    def positive(self, path: str, default: Any = _MISSING) -> Any:
        value = self.number(path, default)
        if value is not default and value == 0:
            raise self.error(f"holds {value!r} where a positive number belongs", path)
        return value

    def whole(self, path: str, default: Any = _MISSING) -> Any:
        """A positive whole number."""
        self.positive(path, default)
        return self(path, int, default)

    def choice(self, path: str, known: Sequence[str], default: str) -> Any:
        value = self(path, str, default)
        if value not in known:
            raise self.error(f"holds {value!r}, which is none of {', '.join(known)}", path)
        return value

    def build(self, path: str, make: Callable[[], T]) -> T:
        """What `make` makes of the values below `path`; what it refuses becomes an error of the recipe."""
        try:
            return make()
        except RecipeError:
            raise
        except (RankAwareError, TypeError, ValueError, OverflowError) as error:
            cause = error.cause if isinstance(error, RankAwareError) else f"{error}."
            raise self.error(f"holds an impossible value: {cause.removesuffix('.')}", path) from error

    def error(self, what: str, path: str) -> RecipeError:
        return RecipeError(f"The recipe {self._target} {what}. @ {path}", "Restore the file, or make it anew.")


def _read_toml(target: Path) -> dict[str, Any]:
    try:
        data = tomli.loads(target.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe at {target}.", "Check the path, or make one by ra.calibrate.") from error
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise RecipeError(f"The recipe {target} cannot be read: {error}.", "Restore it or make it anew.") from error
    schema = data.get("schema")
    if not is_whole(schema):
        raise RecipeError(f"{target} names no schema, so it is no recipe. @ schema", "Give a file made by Recipe.save.")
    if schema > SCHEMA:
        raise RecipeError(
            f"The recipe {target} is of schema {schema}, this package reads up to {SCHEMA}. @ schema",
            "Update rankaware-optim.",
        )
    return data


def _read_tensors(target: Path, name: str, sha256: str) -> dict[str, torch.Tensor]:
    path = target.parent / Path(name).name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"The tensors {path} of the recipe cannot be read: {error}.", "Copy both files.") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RecipeError(
            f"The tensors {path} do not match the recipe's hash. @ tensors.sha256", "Copy both files of one recipe."
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise RecipeError(f"The tensors {path} cannot be read: {error}.", "Make the recipe anew.") from error
