"""The two files of a recipe: TOML for people, safetensors for arrays. A reader never sees files of two versions."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tomli
import tomli_w
from safetensors import safe_open
from safetensors.numpy import load, save

from .._files import read_bytes, replace_bytes
from ..errors import RecipeError
from ._document import SCHEMA, Document, checked

_MOST_TEXT, _MOST_TENSORS = 10_000_000, 1_000_000_000  # bytes
_PATIENCE = 10.0  # seconds to wait for another save in the folder

Array = npt.NDArray[Any]  # of whole numbers, floats or truth values


def write(
    path: str | os.PathLike[str],
    header: str,
    text: dict[str, Any],
    arrays: Mapping[str, Array],
    read_again: Callable[[Document], object],
) -> Path:
    """Write the tensors under a name with their hash, then the TOML that names them, then remove the old tensors.

    Nothing is written if `read_again` raises an error. It gets the document as a reader would get it.
    """
    named = _toml_path(path)
    target = Path(os.path.realpath(named))
    data = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    beside = target.with_name(f"{target.stem}.{sha256[:12]}.safetensors")
    whole = _without_none({"schema": SCHEMA, **text, "tensors": {"file": beside.name, "sha256": sha256}})
    try:
        encoded = (header + tomli_w.dumps(whole)).encode()
        read_again(checked(_parsed(encoded, named), named))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent) as alone:
            _refuse_newer(target)
            replace_bytes(beside, data, like=target)
            replace_bytes(target, encoded)
            for left in _leftovers(target, beside) if alone else ():
                left.unlink(missing_ok=True)
    except (OSError, TypeError, UnicodeEncodeError) as error:
        cure = "Choose a writable folder, and settings that are numbers or strings."
        raise RecipeError(f"The recipe {named} cannot be written: {error}.", cure) from error
    return named


def read(path: str | os.PathLike[str]) -> tuple[Document, dict[str, Array]]:
    """Return the checked TOML and the tensors, which match its hash. Read again if a save came between the two."""
    target = _toml_path(path)
    text = _read_text(target)
    while True:
        try:
            document = checked(_parsed(text, target), target)
            return document, _read_tensors(target, document.tensors.file, document.tensors.sha256)
        except RecipeError:
            before, text = text, _read_text(target)
            if text == before:
                raise


def _toml_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".toml":
        raise RecipeError(f"The name of a recipe's file ends in .toml, not as {str(target)!r}.", "Rename it.")
    return target


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


# --- concurrent saves -----------------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Lock `folder` against other saves until the process ends. Yield False if the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + _PATIENCE
    try:
        locked = None
        while locked is None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OSError(f"another save in its folder has run for more than {_PATIENCE:g} s") from None
                time.sleep(0.005)
            except OSError:  # some network file systems
                locked = False
        yield locked
    finally:
        os.close(handle)


def _refuse_newer(target: Path) -> None:
    try:
        schema = tomli.loads(read_bytes(target, _MOST_TEXT).decode()).get("schema")
    except (OSError, ValueError, RecursionError):
        return  # no recipe is there, or it cannot be read
    if isinstance(schema, int) and schema > SCHEMA:
        raise RecipeError(f"The recipe at {target} has a newer schema, {schema}.", "Update, or name another file.")


def _leftovers(target: Path, beside: Path) -> Iterator[Path]:
    """Yield the files that earlier saves left: the tensors of other versions, and temporary files of killed saves."""
    stem, digits = re.escape(target.stem), "[0-9a-f]{12}"
    tensors = re.compile(rf"{stem}\.{digits}\.safetensors")
    staged = re.compile(rf"\.{stem}(\.toml|(\.{digits})?\.safetensors)\.[0-9a-z_]{{8}}")
    names = os.listdir(target.parent)
    yield from (
        target.with_name(n) for n in names if staged.fullmatch(n) or (tensors.fullmatch(n) and n != beside.name)
    )
    former = target.with_name(f"{target.stem}.safetensors")  # the name in schema 1
    try:
        with safe_open(former, framework="np") as file:
            if "fit.covariance" in file.keys():  # noqa: SIM118
                yield former
    except Exception:  # the file is missing, or belongs to something else
        return


# --- reading --------------------------------------------------------------------------------------------------------


def _read_text(target: Path) -> bytes:
    try:
        return read_bytes(target, _MOST_TEXT)
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe at {target}.", "Check the path, or make one by ra.calibrate.") from error
    except OSError as error:
        raise RecipeError(f"The recipe {target} cannot be read: {error}.", "Restore or remake it.") from error


def _parsed(text: bytes, target: Path) -> dict[str, Any]:
    try:
        return tomli.loads(text.decode("utf-8-sig"))  # Windows' editors put a mark first
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"The recipe {target} cannot be read: {error}.", "Restore or remake it.") from error


def _read_tensors(target: Path, name: str, sha256: str) -> dict[str, Array]:
    path = target.parent / Path(name).name
    if not os.path.lexists(path):  # only the TOML was linked
        path = Path(os.path.realpath(target)).parent / path.name
    try:
        data = read_bytes(path, _MOST_TENSORS)
    except OSError as error:
        raise RecipeError(f"The tensors {path} of the recipe cannot be read: {error}.", "Copy both files.") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RecipeError(
            f"The tensors {path} do not match the recipe's hash. @ tensors.sha256", "Copy both files of the recipe."
        )
    try:
        return load(data)
    except Exception as error:  # safetensors raises its own error, KeyError, TypeError and more
        raise RecipeError(f"The tensors {path} cannot be read: {error}.", "Remake the recipe.") from error
