"""Whose trial is it: every trial names the process that runs it, so that a killed one is known as dead.

A trial whose process was killed stays RUNNING in Optuna's storage for ever. This host's dead are failed when the next
trial begins. Processes of other hosts cannot be seen from here: their trials give signs of life, and are failed when
none came for some minutes. Clocks of hosts differ, so this host's own counts, from the moment it saw the last sign.
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

_BEAT_S = 20.0  # between two signs of life
_SILENT_S = 300.0  # without one, after which another host's trial is dead: its process may be suspended or cut off
_AT_WORK: dict[str, threading.Thread] = {}  # by token of its trial: the thread of this process that runs it
_BEATING: dict[str, _Heartbeat] = {}  # its signs of life
_SEEN: dict[str, tuple[int, float]] = {}  # other hosts' last signs of life, by token, and when they were first seen


def new_owner() -> Owner:
    """This process, as the owner of a trial that is about to begin."""
    token, pid = uuid.uuid4().hex, os.getpid()
    _AT_WORK[token] = threading.current_thread()
    return Owner(socket.gethostname(), _boot(), pid, _started(pid), token)


def release(owner: Owner) -> None:
    """The owner's trial has ended."""
    _AT_WORK.pop(owner.token, None)
    if owner.token in _BEATING:
        _BEATING.pop(owner.token).stop()


def fail_dead_trials(study: Study, mine: Owner | None = None) -> None:
    """Fail trials whose process is gone, or silent on another host; their rank, seed and rate are to be tried again.

    So are those of this thread, but for `mine`: it is here, and no longer at what an interrupt had it leave behind.
    """
    looked = time.monotonic()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        record = TrialRecord.read(trial)
        if record.owner is None or record.owner == mine:
            continue
        if _is_silent(record, record.owner, looked) if _is_elsewhere(record) else not _is_alive(record.owner):
            fail_trial(study, trial, replace(record, killed=True).changes_since(record))


def is_awaited(trial: TrialRecord) -> bool:
    """Whether a running trial is going to end or to be known as dead, so that it pays to wait for it."""
    return trial.heartbeat is not None or not _is_elsewhere(trial)


def to_repeat(trials: Trials) -> TrialRecord | None:
    """The first killed trial that no other repeats."""
    repeated = {trial.retry_of for trial in trials}
    killed = (trial for trial in trials if trial.killed and trial.state == TrialState.FAIL)
    return next((trial for trial in killed if trial.number not in repeated), None)


# --- other hosts ----------------------------------------------------------------------------------------------------


class _Heartbeat(threading.Thread):
    """Signs of life of a running trial. A thread gives them: a step, a download or an evaluation may take long."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(name=f"heartbeat of trial {trial.number}", daemon=True)
        self._trial, self._ended = trial, threading.Event()

    def run(self) -> None:
        for beat in count(1):
            if self._ended.wait(_BEAT_S):
                return
            with suppress(Exception):  # where the storage fails, the run's own writes say so
                try:
                    self._trial.set_user_attr("heartbeat", beat)
                except UpdateFinishedTrialError:
                    return

    def stop(self) -> None:
        """Give no more, once the last one is written."""
        self._ended.set()
        with suppress(RuntimeError):  # an interrupt came before it had started: it then ends at once
            self.join()


def keep_beating(trial: Trial, owner: Owner) -> None:
    """Give signs of life until the trial is released."""
    _BEATING[owner.token] = _Heartbeat(trial)
    _BEATING[owner.token].start()


def _is_elsewhere(trial: TrialRecord) -> bool:
    """Whether a trial belongs to another host, or to one of this name that gives signs of life of its own."""
    if trial.owner is None or trial.owner.host != socket.gethostname():
        return True
    return trial.owner.boot != _boot() and trial.heartbeat is not None


def _is_silent(trial: TrialRecord, owner: Owner, looked: float) -> bool:
    """Whether another host's trial gave no sign of life for as long as it takes, up to when it was `looked` at.

    Trials of versions that give none are left alone.
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
        return True  # os.kill would end it there; what cannot be known to be dead is left alone
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return _started(owner.pid) == owner.started


def _boot() -> str:
    """Names this run of the kernel and this container, where processes have their numbers; empty if nothing does."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks, since its number may be used again; a zombie has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
