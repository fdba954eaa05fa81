"""Every call by which Python code changes a file: a process is ended before it or in the middle of it, or it fails.

The functions are those of `os`, and `open` with the files that it opens. A write counts twice: before anything is
written, and with half of it written. What a library does in C is not reached: SQLite's writes, and filelock's opening
of its lock file, which is empty. SQLite is attacked by kills at random moments (kills.py).
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from attacks.outcomes import Refused

CHANGING = (
    "chmod", "fsync", "ftruncate", "link", "mkdir", "remove", "rename", "replace", "rmdir", "symlink", "truncate",
    "unlink", "write",
)  # fmt: skip
READING = ("stat", "fstat", "listdir", "scandir")
_ENDED, _RAISED = 99, 98  # exit codes


class _File:
    """A file whose writes are seen, in two halves."""

    def __init__(self, file: Any, seen: Callable[[], None]) -> None:
        self._file, self._seen = file, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._seen()
        written = self._file.write(data[:half])
        self._file.flush()
        self._seen()
        return int(written + self._file.write(data[half:]))


@contextmanager
def acting(
    at: int, act: Callable[[], None], reads: bool = False
) -> Iterator[Callable[[], int]]:
    """Run `act` at call number `at` of those that change files, or also of those that read; yields their number."""
    lock, count = threading.Lock(), 0

    def seen() -> None:
        nonlocal count
        with lock:
            count += 1
            mine = count
        if mine == at:
            act()

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            seen()
            return real(*args, **kwargs)

        return called

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        changes = any(letter in mode for letter in "wxa+")
        if changes or reads:
            seen()
        found = _OPEN(file, mode, *args, **kwargs)
        return _File(found, seen) if changes else found

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if reads or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            seen()
        return _OS_OPEN(path, flags, *args, **kwargs)

    names = CHANGING + (READING if reads else ())
    with ExitStack() as patches:
        patches.enter_context(
            patch.multiple(
                os, open=os_open, **{name: wrapped(getattr(os, name)) for name in names}
            )
        )
        patches.enter_context(patch.object(builtins, "open", opened))
        patches.enter_context(patch.object(io, "open", opened))
        yield lambda: count


_OPEN, _OS_OPEN = builtins.open, os.open


def fail() -> None:
    raise OSError(28, "No space left on device (injected)")


def ends_at(at: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that ends at its call number `at`. Return whether it came there."""

    def ended() -> None:
        with acting(at, lambda: os._exit(_ENDED)):
            work()

    return _waited(forked(ended)) == _ENDED


def forked(work: Callable[[], object]) -> int:
    """The id of a new process that does `work`."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(_RAISED)
    os._exit(0)


def _waited(child: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, _ENDED):
        raise AssertionError(f"the process ended with {code}")
    return code


def in_child(work: Callable[[], object], refusals: Any, limit: float) -> None:
    """Do `work` in a process of its own, which is killed after `limit` seconds.

    Raises:
        Refused: `work` raised one of `refusals`, with its message.
        AssertionError: it raised anything else, died, or took longer.
    """
    reading, writing = os.pipe()

    def reported() -> None:
        try:
            work()
            said = "held"
        except refusals as error:
            said = f"refused {error}"
        except BaseException as error:
            said = f"failed {type(error).__name__}: {error}"
        os.write(writing, said.encode("utf-8", "replace")[:4000])

    child = forked(reported)
    os.close(writing)
    end = time.monotonic() + limit
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.002)
    if not found[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with _OPEN(reading, "rb") as pipe:
        outcome, _, words = pipe.read().decode().partition(" ")
    if not found[0]:
        raise AssertionError(f"it did not end within {limit:.1f} s")
    if outcome == "refused":
        raise Refused(words)
    if outcome != "held":
        raise AssertionError(
            words or f"the process ended with {os.waitstatus_to_exitcode(found[1])}"
        )
