"""Where Optuna's public face does not reach: all of its private names that this package uses.

Trials of several processes meet in one storage, and a process may die at any moment. So a trial says whose it is from
its first moment, which `Study.ask` cannot do: its attributes come later. A trial whose process died is marked and
failed by another process, where `Study.tell` would raise if a third had been first. And the connections of a database
that was opened by its URL are given back: Optuna puts a cache around the storage that holds them.

tests/calibration/test_optuna.py fails where one of these moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
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


def close_database(storage: BaseStorage) -> None:
    """Give a database's connections back; other storages hold none."""
    held = getattr(storage, "_backend", storage)
    if isinstance(held, RDBStorage):
        held.remove_session()
        held.engine.dispose()
