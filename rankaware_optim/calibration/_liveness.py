"""Whose trial is it: every trial names the process that runs it, so that a killed one is known as dead.

A trial whose process was killed stays RUNNING in Optuna's storage for ever. This host's dead are failed when the next
trial begins. What runs on other hosts cannot be seen from here and is left alone.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from dataclasses import replace
from pathlib import Path

from optuna.study import Study
from optuna.trial import TrialState

from ._optuna import fail_trial
from ._trials import Owner, TrialRecord, Trials

_AT_WORK: dict[str, threading.Thread] = {}  # by token of its trial: the thread of this process that runs it


def new_owner() -> Owner:
    """This process, as the owner of a trial that is about to begin."""
    token, pid = uuid.uuid4().hex, os.getpid()
    _AT_WORK[token] = threading.current_thread()
    return Owner(socket.gethostname(), _boot(), pid, _started(pid), token)


def release(owner: Owner) -> None:
    """The owner's trial has ended."""
    _AT_WORK.pop(owner.token, None)


def is_elsewhere(trial: TrialRecord) -> bool:
    """Whether a trial belongs to another host, of whose processes nothing is known here."""
    return trial.owner is None or trial.owner.host != socket.gethostname()


def fail_dead_trials(study: Study, mine: Owner | None = None) -> None:
    """Fail this host's trials whose process is gone; their rank, seed and rate are to be tried again.

    So are those of this thread, but for `mine`: it is here, and no longer at what an interrupt had it leave behind.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        record = TrialRecord.read(trial)
        if record.owner not in (None, mine) and not (is_elsewhere(record) or _is_alive(record.owner)):
            fail_trial(study, trial, replace(record, killed=True).changes_since(record))


def to_repeat(trials: Trials) -> TrialRecord | None:
    """The first killed trial that no other repeats."""
    repeated = {trial.retry_of for trial in trials}
    killed = (trial for trial in trials if trial.killed and trial.state == TrialState.FAIL)
    return next((trial for trial in killed if trial.number not in repeated), None)


def _is_alive(owner: Owner | None) -> bool:
    if owner is None or owner.boot != _boot():
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
    """Names this run of the kernel; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks, since its number may be used again; a zombie has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
