"""The two files of a recipe: TOML for people, safetensors for arrays; checked at the door, written atomically."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import RecipeError

__all__ = ["SCHEMA", "Reader", "read", "write"]

SCHEMA = 1


def write(path: str | os.PathLike[str], header: str, text: dict[str, Any], arrays: Mapping[str, torch.Tensor]) -> Path:
    """Write the TOML file `path` and the safetensors file beside it; a reader finds both or no recipe."""
    import tomli_w
    from safetensors.torch import save

    target = _toml_path(path)
    beside = target.with_suffix(".safetensors")
    data = save({key: value.contiguous() for key, value in arrays.items()})
    hashed = {"tensors": {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}}
    encoded = (header + tomli_w.dumps(_without_none({"schema": SCHEMA, **text, **hashed}))).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors, toml = _staged(beside, data), _staged(target, encoded)
        target.unlink(missing_ok=True)  # so that no reader pairs the old text with the new tensors
        os.replace(tensors, beside)
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


def _staged(target: Path, data: bytes) -> Path:
    """`data` in a synced temporary file beside `target`, ready to replace it."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


_MISSING: Any = object()


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
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"holds {value!r} where a {kind.__name__} belongs", path)
        return value

    def number(self, path: str, default: Any = _MISSING) -> Any:
        value = self(path, (int, float), default)  # type: ignore[arg-type]
        if value is not default and not math.isfinite(value):
            raise self.error(f"holds {value!r}", path)
        return value

    def positive(self, path: str, default: Any = _MISSING) -> Any:
        value = self.number(path, default)
        if value is not default and value <= 0:
            raise self.error(f"holds {value!r} where a positive number belongs", path)
        return value

    def error(self, what: str, path: str) -> RecipeError:
        return RecipeError(f"The recipe {self._target} {what}. @ {path}", "Restore the file, or make it anew.")


def _read_toml(target: Path) -> dict[str, Any]:
    import tomli

    try:
        data = tomli.loads(target.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe at {target}.", "Check the path, or make one by ra.calibrate.") from error
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise RecipeError(f"The recipe {target} cannot be read: {error}.", "Restore it or make it anew.") from error
    schema = data.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise RecipeError(f"{target} names no schema, so it is no recipe. @ schema", "Give a file made by Recipe.save.")
    if schema > SCHEMA:
        raise RecipeError(
            f"The recipe {target} is of schema {schema}, this package reads up to {SCHEMA}. @ schema",
            "Update rankaware-optim.",
        )
    return data


def _read_tensors(target: Path, name: str, sha256: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

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
