"""The files of a recipe: TOML, which is complete by itself, and safetensors with the trials behind
it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tomli
import tomli_w

from .._files import read_bytes, replace_bytes
from ..errors import RecipeError
from ._document import SCHEMA, AnyRecipe, checked, header, recipe_from, to_document
from ._recipe_data import Array, RecipeData

# Bytes. A calibration's TOML has some 3 kB, and its trials 4 bytes for each value of a curve.
_MOST_TEXT, _MOST_TENSORS, _MOST_HEADER = 256_000, 250_000_000, 100_000


def save(recipe: RecipeData, path: str | os.PathLike[str]) -> Path:
    """Write the trials under a name with their hash, then the TOML that names them, then remove the
    former trials.

    Nothing is written that a reader would refuse.
    """
    named = _toml_path(path)
    target = Path(os.path.realpath(named))
    arrays = recipe.arrays()
    data = _encoded(arrays)
    sha256 = hashlib.sha256(data).hexdigest()
    beside = target.with_name(f"{target.stem}.{sha256[:12]}.safetensors")
    trials_file = {"file": beside.name, "sha256": sha256} if data else None
    try:
        document = {"schema": SCHEMA, **to_document(recipe), "tensors": trials_file}
        encoded = (header(recipe) + _toml(document)).encode()
        _check_sizes(named, encoded, data)
        read_again = checked(_parsed(encoded, named), named)
        recipe_from(type(recipe), read_again, arrays, "", named)
        target.parent.mkdir(parents=True, exist_ok=True)
        former = _replaceable(target)
        if data:
            replace_bytes(beside, data, like=target)
        replace_bytes(target, encoded)
        if data and not beside.exists():  # another save over the same recipe removed it
            replace_bytes(beside, data, like=target)
    except (OSError, TypeError, UnicodeEncodeError) as error:
        cure = "Choose a writable folder, and settings that are numbers or strings."
        raise RecipeError(
            f"The recipe {named} cannot be written: {error}.", cure
        ) from error
    with suppress(OSError):
        _remove_tensors(target, former)
    return named


def load(cls: type[AnyRecipe], path: str | os.PathLike[str]) -> AnyRecipe:
    """Return the recipe in a TOML file, with its trials if their file is there."""
    target = _toml_path(path)
    values = checked(_parsed(_read_text(target), target), target)
    if "trials.file" not in values:
        return recipe_from(cls, values, {}, "", target)
    beside = _beside(target, values["trials.file"])
    try:
        tensors = _read_tensors(beside, values["trials.sha256"])
    except FileNotFoundError as error:
        if "covariance" not in values:
            raise _unreadable(beside, error) from error
        return recipe_from(cls, values, {}, beside.name, target)
    return recipe_from(cls, values, tensors, "", target)


def _encoded(arrays: Mapping[str, Array]) -> bytes:
    """Return arrays as a safetensors file, empty if there are none."""
    if not arrays:
        return b""
    whole = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    return safetensors.numpy.save(whole)


def _toml_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".toml":
        raise RecipeError(
            f"The name of a recipe's file ends in .toml, not as {str(target)!r}.",
            "Rename it.",
        )
    return target


def _toml(value: Mapping[str, Any]) -> str:
    """Return values as TOML, without those that are None. Matrices have a row in a line."""
    fit = "\n".join(f"    {list(row)}," for row in value["fit"]["covariance"])
    rest = {key: inner for key, inner in value.items() if key != "fit"}
    return f"{tomli_w.dumps(_without_none(rest))}\n[fit]\ncovariance = [\n{fit}\n]\n"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _check_sizes(target: Path, text: bytes, data: bytes) -> None:
    """Raise a `RecipeError` if a reader would refuse a file for its size."""
    if len(text) > _MOST_TEXT:
        raise RecipeError(
            f"The recipe {target} would have {len(text):,} bytes, more than {_MOST_TEXT:,}.",
            "Shorten its notes, settings and names of parameters.",
        )
    if len(data) > _MOST_TENSORS:
        raise RecipeError(
            f"The trials of the recipe {target} have {len(data):,} bytes, more than"
            f" {_MOST_TENSORS:,}.",
            "Save it without them: dataclasses.replace(recipe, tensors={}).save(path).",
        )


# --- what a save replaces -------------------------------------------------------------------------


def _replaceable(target: Path) -> Mapping[str, Any]:
    """Return the table `tensors` of the recipe that a save replaces, empty if there is none.

    Raises:
        OSError: it is not a regular file.
        RecipeError: it is read-only by its mode, or has a newer schema.
    """
    if target.exists() and not target.is_file():
        raise OSError("it is not a regular file")
    with suppress(FileNotFoundError):
        if not target.stat().st_mode & stat.S_IWUSR:
            raise RecipeError(
                f"The recipe {target} is read-only.",
                "Make it writable, or name another file.",
            )
    try:
        before = tomli.loads(read_bytes(target, _MOST_TEXT).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}  # no recipe is there, or it cannot be read
    schema, tensors = before.get("schema"), before.get("tensors")
    if isinstance(schema, int) and schema > SCHEMA:
        raise RecipeError(
            f"The recipe at {target} has a newer schema, {schema}.",
            "Update, or name another file.",
        )
    return tensors if isinstance(tensors, dict) else {}


def _remove_tensors(target: Path, former: Mapping[str, Any]) -> None:
    """Remove the file that a replaced recipe named, if its name and the recipe have its hash and no
    recipe names it.
    """
    file, sha256 = former.get("file"), former.get("sha256")
    if not isinstance(file, str) or not isinstance(sha256, str):
        return
    path = target.with_name(Path(file).name)
    if not path.name.endswith(f".{sha256[:12]}.safetensors"):
        return
    data = read_bytes(path, _MOST_TENSORS)
    if hashlib.sha256(data).hexdigest() != sha256 or _is_named(path):
        return
    path.unlink()
    if _is_named(path):  # by another save since
        replace_bytes(path, data, like=target)


def _is_named(path: Path) -> bool:
    """Return whether a TOML file in the folder of a file of tensors may name it."""
    tomls = [each for each in path.parent.iterdir() if each.suffix.lower() == ".toml"]
    return any(_may_name(toml, path.name) for toml in tomls)


def _may_name(toml: Path, name: str) -> bool:
    """Return whether a TOML file names a file of tensors. One that cannot be read may."""
    try:
        tensors = tomli.loads(read_bytes(toml, _MOST_TEXT).decode("utf-8-sig")).get(
            "tensors"
        )
    except (OSError, ValueError, RecursionError):
        return True
    file = tensors.get("file") if isinstance(tensors, dict) else None
    return isinstance(file, str) and Path(file).name.lower() == name.lower()


# --- reading --------------------------------------------------------------------------------------


def _read_text(target: Path) -> bytes:
    try:
        return read_bytes(target, _MOST_TEXT)
    except FileNotFoundError as error:
        raise RecipeError(
            f"There is no recipe at {target}.",
            "Check the path, or make one by ra.calibrate.",
        ) from error
    except OSError as error:
        raise RecipeError(
            f"The recipe {target} cannot be read: {error}.", "Restore or remake it."
        ) from error


def _parsed(text: bytes, target: Path) -> dict[str, Any]:
    try:
        return tomli.loads(
            text.decode("utf-8-sig")
        )  # Windows' editors put a mark first
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"The recipe {target} cannot be read: {error}.", "Restore or remake it."
        ) from error


def _beside(target: Path, name: str) -> Path:
    """Return the path of a file beside the recipe, or beside what it links to."""
    path = target.parent / Path(name).name
    return (
        path
        if os.path.lexists(path)
        else Path(os.path.realpath(target)).parent / path.name
    )


def _read_tensors(path: Path, sha256: str) -> dict[str, Array]:
    try:
        data = read_bytes(path, _MOST_TENSORS)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RecipeError(
            f"The tensors {path} do not match the recipe's hash. @ tensors.sha256",
            "Copy both files of the recipe.",
        )
    if int.from_bytes(data[:8], "little") > _MOST_HEADER:
        raise _unreadable(path, "their header is too long", "Remake the recipe.")
    try:
        return safetensors.numpy.load(data)
    except (
        Exception
    ) as error:  # safetensors raises its own error, KeyError, TypeError and more
        raise _unreadable(path, error, "Remake the recipe.") from error


def _unreadable(path: Path, why: object, cure: str = "Copy both files.") -> RecipeError:
    return RecipeError(f"The tensors {path} of the recipe cannot be read: {why}.", cure)
