"""A worker's life: signs of it, and signals that wait.

A worker writes heartbeats into its running trial, and fails the trials whose heartbeats have
stopped. A trial whose process was killed stays RUNNING in Optuna's storage, and that of a stopped
process goes on when it is woken. Only the storage is asked who lives, so that one rule holds for
every host, system and storage.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import Trial, TrialState

from ._constants import BEAT_S, JOIN_S, MISSED


class Heartbeat(threading.Thread):
    """A worker's signs of life, and its look at those of others. In a thread, since a step may take
    long.

    Silence is counted in looks, and not by a clock: a storage or a machine that stood still proves
    nothing.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.trial: Trial | None = None  # that this worker runs
        self._study = study
        # by trial of others: the last heartbeat, and looks without a new one
        self._seen: dict[int, tuple[object, int]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        for beat in count(1):
            # where the storage fails, other reads and writes raise
            with suppress(Exception):
                self.look()
            if self._ended.wait(BEAT_S):
                return
            with suppress(Exception):  # also where another worker has failed the trial
                if self.trial is not None:
                    self.trial.set_user_attr("heartbeat", beat)

    def look(self) -> None:
        """Fail the trials of other workers that have been silent for too long."""
        own = self.trial
        for trial in self._study.get_trials(False, (TrialState.RUNNING,)):
            if own is not None and trial.number == own.number:
                continue
            beat = trial.user_attrs.get("heartbeat")
            last, missed = self._seen.get(trial.number, (self, 0))
            missed = missed + 1 if beat == last else 0
            self._seen[trial.number] = beat, missed
            if missed >= MISSED:
                with suppress(UpdateFinishedTrialError):  # another worker was first
                    self._study.tell(
                        trial.number, state=TrialState.FAIL, skip_if_finished=True
                    )

    def stop(self) -> None:
        """Stop after the current write."""
        self._ended.set()
        if self.is_alive():
            self.join(JOIN_S)


@contextmanager
def held_back(most: float = 1) -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the context, unless an interruption is being
    raised then.

    most: so many are held back. By default a second one raises at once, since the code inside may
        wait for another process.

    It works in the main thread, for a signal that has a Python handler.
    """
    before: dict[int, Any] = {}
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)
        if len(held) > most:
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for known in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(known)):
                before[known] = signal.signal(known, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            before[held[0]](held[0], None)
