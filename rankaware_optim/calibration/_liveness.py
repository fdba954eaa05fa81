"""Signs of life. A worker writes heartbeats into its running trial, and fails the trials whose
heartbeats have stopped.

A trial whose process was killed stays RUNNING in Optuna's storage, and that of a stopped process
goes on when it is woken. Only the storage is asked who lives, so that one rule holds for every
host, system and storage.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from itertools import count

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
