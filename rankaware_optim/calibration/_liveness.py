"""Whose trial is it: host, boot, process and its start, written on every trial, so that a killed one is known as dead.

A trial whose process was killed stays RUNNING in Optuna's storage for ever. This host's dead are failed when the next
trial begins; what runs on other hosts cannot be seen from here and is left alone.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

__all__ = ["bury_dead", "disown", "is_elsewhere", "new_owner", "unretried"]

Owner = dict[str, Any]

_AT_WORK: set[str] = set()  # tokens of the trials that this process runs


def new_owner() -> Owner:
    """This process, as the owner of a trial that is about to begin."""
    token = uuid.uuid4().hex
    _AT_WORK.add(token)
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid), "token": token}


def disown(owner: Owner) -> None:
    """The trial has ended."""
    _AT_WORK.discard(owner["token"])


def is_elsewhere(trial: FrozenTrial) -> bool:
    """Whether a trial belongs to another host, of whose processes nothing is known here."""
    return _owner(trial).get("host") != socket.gethostname()


def bury_dead(study: Study) -> None:
    """Fail this host's trials whose process is gone; their rank, seed and rate are to be tried again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not is_elsewhere(trial) and not _is_alive(_owner(trial)):
            _fail(study, trial)


def unretried(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The first killed trial that no other has taken up."""
    taken = {trial.user_attrs.get("retry_of") for trial in trials}
    killed = (t for t in trials if t.state == TrialState.FAIL and "killed" in t.user_attrs)
    return next((trial for trial in killed if trial.number not in taken), None)


def _fail(study: Study, trial: FrozenTrial) -> None:
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        study._storage.set_trial_user_attr(trial._trial_id, "killed", True)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return  # another worker was first


def _owner(trial: FrozenTrial) -> Owner:
    return dict(trial.user_attrs.get("owner", {}))


def _is_alive(owner: Owner) -> bool:
    if owner["boot"] != _boot():
        return False
    if owner["pid"] == os.getpid():
        return owner["token"] in _AT_WORK
    return _runs(owner["pid"]) and _started(owner["pid"]) == owner["started"]


def _runs(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it there; what cannot be known to be dead is left alone
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
