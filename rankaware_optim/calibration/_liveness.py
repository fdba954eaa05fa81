"""A worker's life: signs of it, and signals that wait.

A worker writes heartbeats into its running trial, and fails the trials whose heartbeats have
stopped. A trial whose process was killed stays RUNNING in Optuna's storage, and that of a stopped
process goes on when it is woken. Only the storage is asked who lives, so that one rule holds for
every host, system and storage.

Ctrl-C and SIGTERM are delayed where an interrupted operation would leave an inconsistent state.
"""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ._storage import fail_killed

# seconds between two heartbeats, and between two looks at those of others
_BEAT_S = 10.0
_MISSED = 4  # looks in a row without a new heartbeat after which a trial counts as dead
_JOIN_S = 10.0  # seconds that a write in progress may take at the end
_LEFT: set[str] = set()  # workers of this process that have ended


class Heartbeat(threading.Thread):
    """A worker's signs of life, and its look at those of others. In a thread, since a step may take
    long.

    Silence is counted in looks, and not by a clock: a storage or a machine that stood still proves
    nothing.
    """

    def __init__(self) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.worker = uuid.uuid4().hex
        self.trial: Trial | None = None  # that this worker runs
        # by trial of others: the last heartbeat, and looks without a new one
        self._signs: dict[int, tuple[object, int]] = {}
        # trials of others that have shown a sign of life since this worker began to look
        self.heard: set[int] = set()
        self._ended = threading.Event()

    def watch(self, study: Study) -> None:
        """Begin to beat and to look. A trial that this process left behind is failed at once."""
        self._study = study
        for trial in _running(study):
            if trial.user_attrs.get("worker") in _LEFT:
                fail_killed(study, trial)
        self.start()

    def run(self) -> None:
        for beat in count(1):
            # where the storage fails, other reads and writes raise
            with suppress(Exception):
                self._look()
            if self._ended.wait(_BEAT_S):
                return
            with suppress(Exception):  # also where another worker has failed the trial
                if self.trial is not None:
                    self.trial.set_user_attr("heartbeat", beat)

    def _look(self) -> None:
        """Fail the trials of other workers that have been silent for too long."""
        for trial in _running(self._study):
            if self.trial is not None and trial.number == self.trial.number:
                continue
            number = trial.number
            beat = trial.user_attrs.get("heartbeat")
            last, missed = self._signs.get(number, (beat, -1))
            if beat != last:
                self.heard.add(number)
                missed = -1
            self._signs[number] = beat, missed + 1
            if missed + 1 >= _MISSED:
                fail_killed(self._study, trial)

    def stop(self) -> None:
        """Stop after the current write."""
        _LEFT.add(self.worker)
        self._ended.set()
        with suppress(RuntimeError):  # it was never started
            self.join(_JOIN_S)


def _running(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


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
