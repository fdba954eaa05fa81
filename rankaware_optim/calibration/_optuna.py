"""Where Optuna's public face does not reach: all of its private names that this package uses.

Trials of several processes meet in one storage, and a process may die at any moment. So a trial says whose it is from
its first moment, which `Study.ask` cannot do: its attributes come later. A trial whose process died is marked and
failed by another process, where `Study.tell` would raise if a third had been first. And what was opened is given back,
a database's connections and a journal's lock: both lie under what Optuna puts around them.

tests/calibration/test_optuna.py fails where one of these moves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, cast

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState


def begin_trial(study: Study, attributes: Mapping[str, Any], params: Mapping[str, float]) -> Trial:
    """A running trial that has `attributes` from the start, and is going to have `params` where they are given."""
    template = FrozenTrial(
        number=-1, trial_id=-1, state=TrialState.RUNNING, value=None, params={}, distributions={},
        user_attrs=dict(attributes), system_attrs={"fixed_params": dict(params)} if params else {},
        intermediate_values={}, datetime_start=datetime.now(), datetime_complete=None,
    )  # fmt: skip
    return Trial(study, study._storage.create_new_trial(study._study_id, template))


def fail_trial(study: Study, trial: FrozenTrial, attributes: Mapping[str, Any]) -> None:
    """Mark another process's running trial with `attributes` and fail it, unless somebody else was first."""
    try:
        for name, value in attributes.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return


def close_storage(storage: BaseStorage) -> None:
    """Give back a database's connections, or a journal's lock that an interrupt left held."""
    held = getattr(storage, "_backend", storage)
    if isinstance(held, RDBStorage):
        held.remove_session()
        held.engine.dispose()
    elif isinstance(held, JournalFileBackend):
        cast(Any, held._lock).release(force=True)


_QUIET = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing below a warning; its level is as it was afterwards, also where threads do this at once."""
    logger = logging.getLogger("optuna")
    with _QUIET:
        before = logger.level
        logger.setLevel(max(before, logging.WARNING))
        try:
            yield
        finally:
            logger.setLevel(before)
