"""This module reads regular files completely and replaces files atomically. (The module
`recipe/_files.py` saves and loads recipes.)
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file and return its content.

    Raises:
        OSError: it cannot be read, is not a regular file, or is longer than `most` bytes.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise OSError(_not_regular(path))
        if status.st_size > most:
            raise OSError(
                f"{path} is longer than {most:,} bytes, the most that can be read. Check that the"
                " path leads to the right file"
            )
        return path.read_bytes()
    except ValueError as error:  # a name that contains a NUL
        raise OSError(str(error)) from error


def _not_regular(path: Path) -> str:
    # The callers put this text into a sentence of their own, and add the full stop.
    return f"{path} is not a regular file. Pass the path of a file, not of a folder or a pipe"


def replaceable(path: Path) -> Path:
    """Follow all symbolic links in a path and return the path of the file.

    Raises:
        OSError: something other than a regular file is there.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(_not_regular(target))
    return target


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace the content of a file atomically. If the path is a symbolic link, replace
    the content of the file that the link points to.

    If the file already exists, its permissions do not change. If the file does not exist yet, it is
    created with the default permissions.

    Raises:
        OSError: the file cannot be written. Its old content is unchanged.
    """
    # The new content goes to a temporary file in the same folder, because os.replace is only
    # atomic within one file system. fsync comes before the replacement: otherwise a power
    # failure could leave an empty file under the final name.
    target = replaceable(path)
    made = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(made, "xb") as file:
            with suppress(FileNotFoundError):
                mode = os.stat(target).st_mode
                os.chmod(made, stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, target)
    finally:
        made.unlink(missing_ok=True)
