"""All private names of Optuna that this package uses, where its public API is not enough.

Several processes share one storage, and a process may die at any time. So a trial must name its
owner from its creation. `Study.ask` cannot do this, because it sets attributes later. A trial whose
process died is marked and failed by another process. `Study.tell` would raise if a third process
had been first. Database connections and journal locks are released, which Optuna's wrappers hide.

tests/calibration/test_optuna.py fails if one of these names changes.
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


def begin_trial(
    study: Study, attributes: Mapping[str, Any], params: Mapping[str, float]
) -> Trial:
    """Create a running trial that has `attributes` from the start, and fixed `params` if given."""
    template = FrozenTrial(
        number=-1, trial_id=-1, state=TrialState.RUNNING, value=None, params={}, distributions={},
        user_attrs=dict(attributes), system_attrs={"fixed_params": dict(params)} if params else {},
        intermediate_values={}, datetime_start=datetime.now(), datetime_complete=None,
    )  # fmt: skip
    return Trial(study, study._storage.create_new_trial(study._study_id, template))


def fail_trial(study: Study, trial: FrozenTrial, attributes: Mapping[str, Any]) -> None:
    """Mark another process's running trial with `attributes` and fail it, unless another process
    was first.
    """
    try:
        for name, value in attributes.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return


def close_storage(storage: BaseStorage) -> None:
    """Release a database's connections, or a journal's lock that an interrupt left held."""
    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage):
        backend.remove_session()
        backend.engine.dispose()
    elif isinstance(backend, JournalFileBackend):
        cast(Any, backend._lock).release(force=True)


_QUIET = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna below warnings and restore its level afterwards. Safe in several threads at
    once.
    """
    logger = logging.getLogger("optuna")
    with _QUIET:
        before = logger.level
        logger.setLevel(max(before, logging.WARNING))
        try:
            yield
        finally:
            logger.setLevel(before)
