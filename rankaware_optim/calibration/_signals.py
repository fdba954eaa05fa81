"""Delay Ctrl-C and SIGTERM where an interrupted operation would leave an inconsistent state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """A context that delays Ctrl-C except inside `with interrupts.let_in():`.

    The first Ctrl-C inside raises KeyboardInterrupt and disables further ones, so that a second
    Ctrl-C cannot interrupt the clean-up. A delayed Ctrl-C is delivered when the context ends,
    unless an interruption is already being raised.

        with Interrupts() as interrupts, restored(model):
            with interrupts.let_in():
                ...

    With `once`, only the first Ctrl-C is delayed. A second one raises at once, since the code
    inside may wait for another process or a server.

    It works in the main thread if Ctrl-C has a Python handler. Otherwise no KeyboardInterrupt can
    occur. SIGTERM is treated in the same way if it has a Python handler, as the command's processes
    have.
    """

    def __init__(self, once: bool = False) -> None:
        self._open = False
        self._once = once
        self._pending: tuple[int, FrameType | None] | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if callable(before):
                self._before[number] = before
                signal.signal(number, self._answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        self._open = False
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._pending is not None and not isinstance(error, KeyboardInterrupt):
            self._deliver(*self._pending)

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        self._before[number](number, frame)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if not (self._open or (self._once and self._pending is not None)):
            self._pending = number, frame
            return
        self._open = False
        self._deliver(number, frame)

    def listen(self) -> None:
        """Let Ctrl-C raise again, at once if one was delayed, even if a caller swallowed the last
        one.
        """
        self._open = True
        if self._pending is not None:
            pending = self._pending
            self._pending = None
            self._open = False
            self._deliver(*pending)

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """A context in which Ctrl-C raises."""
        self.listen()
        try:
            yield
        finally:
            self._open = False
