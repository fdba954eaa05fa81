"""Ownership of trials. Every trial names the process that runs it, so that the trial of a killed process is detected.

A trial whose process was killed stays RUNNING in Optuna's storage. On this host such trials are failed when the next
trial begins. Processes of other hosts cannot be seen. Their trials write heartbeats and are failed after some minutes
without one. Clocks of hosts differ, so the time is measured by this host's clock since it read the last heartbeat.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import Trial, TrialState

from ._optuna import fail_trial
from ._trials import Owner, TrialRecord, Trials

_BEAT_S = 20.0  # seconds between two heartbeats
_SILENT_S = 300.0  # seconds without a heartbeat after which another host's trial counts as dead
_AT_WORK: dict[str, threading.Thread] = {}  # the thread of this process that runs a trial, by the trial's token
_BEATING: dict[str, _Heartbeat] = {}  # its heartbeat thread
_SEEN: dict[str, tuple[int, float]] = {}  # other hosts' last heartbeats by token, and when they were first read


def new_owner() -> Owner:
    """Return this process as the owner of a new trial."""
    token, pid = uuid.uuid4().hex, os.getpid()
    _AT_WORK[token] = threading.current_thread()
    return Owner(socket.gethostname(), _boot(), pid, _started(pid), token)


def release(owner: Owner) -> None:
    """Record that the owner's trial has ended."""
    _AT_WORK.pop(owner.token, None)
    if owner.token in _BEATING:
        _BEATING.pop(owner.token).stop()


def fail_dead_trials(study: Study, mine: Owner | None = None) -> None:
    """Fail trials whose process is gone, or silent on another host. Their rank, seed and rate are to be tried again.

    Earlier trials of this thread are failed too, since an interrupt made it leave them. `mine` is kept.
    """
    looked = time.monotonic()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        record = TrialRecord.read(trial)
        if record.owner is None or record.owner == mine:
            continue
        if _is_silent(record, record.owner, looked) if _is_elsewhere(record) else not _is_alive(record.owner):
            fail_trial(study, trial, replace(record, killed=True).changes_since(record))


def is_awaited(trial: TrialRecord) -> bool:
    """Return whether a running trial will end or be detected as dead. Otherwise waiting for it is useless."""
    return trial.heartbeat is not None or not _is_elsewhere(trial)


def to_repeat(trials: Trials) -> TrialRecord | None:
    """Return the first killed trial that no other trial repeats."""
    repeated = {trial.retry_of for trial in trials}
    killed = (trial for trial in trials if trial.killed and trial.state == TrialState.FAIL)
    return next((trial for trial in killed if trial.number not in repeated), None)


# --- other hosts ----------------------------------------------------------------------------------------------------


class _Heartbeat(threading.Thread):
    """The heartbeat of a running trial, in a thread, since a step, a download or an evaluation may take long."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(name=f"heartbeat of trial {trial.number}", daemon=True)
        self._trial, self._ended = trial, threading.Event()

    def run(self) -> None:
        for beat in count(1):
            if self._ended.wait(_BEAT_S):
                return
            with suppress(Exception):  # if the storage fails, the run's own writes raise
                try:
                    self._trial.set_user_attr("heartbeat", beat)
                except UpdateFinishedTrialError:
                    return

    def stop(self) -> None:
        """Stop after the current write."""
        self._ended.set()
        with suppress(RuntimeError):  # an interrupt came before the thread was started
            self.join()


def keep_beating(trial: Trial, owner: Owner) -> None:
    """Write heartbeats until the trial is released."""
    _BEATING[owner.token] = _Heartbeat(trial)
    _BEATING[owner.token].start()


def _is_elsewhere(trial: TrialRecord) -> bool:
    """Return whether a trial belongs to another host, or to a host of the same name that writes its own heartbeats."""
    if trial.owner is None or trial.owner.host != socket.gethostname():
        return True
    return trial.owner.boot != _boot() and trial.heartbeat is not None


def _is_silent(trial: TrialRecord, owner: Owner, looked: float) -> bool:
    """Return whether another host's trial had no new heartbeat for `_SILENT_S` when it was read at time `looked`.

    Trials of older versions, which write no heartbeats, are kept.
    """
    if trial.heartbeat is None:
        return False
    beat, since = _SEEN.get(owner.token, (-1, 0.0))
    if beat != trial.heartbeat:
        _SEEN[owner.token] = trial.heartbeat, time.monotonic()
        return False
    return looked - since > _SILENT_S


# --- this host ------------------------------------------------------------------------------------------------------


def _is_alive(owner: Owner) -> bool:
    if owner.boot != _boot():
        return False
    if owner.pid == os.getpid():
        thread = _AT_WORK.get(owner.token, threading.current_thread())
        return thread.is_alive() and thread is not threading.current_thread()
    if os.name != "posix":
        return True  # os.kill would end the process there, so nothing is known to be dead
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process of another user
    return _started(owner.pid) == owner.started


def _boot() -> str:
    """Return a name of this boot and container, in which process numbers are unique; "" if there is none."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process began, in kernel ticks, since its number may be used again. A zombie has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
