"""What `_storage.py` uses of Optuna's private names: it is still there, does what we need, and is used nowhere else."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import optuna
import pytest
from filelock import FileLock
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import rankaware_optim
from rankaware_optim.calibration._storage import begin_trial, close_storage, fail_killed

PRIVATE = {"_storage", "_study_id", "_trial_id", "_backend", "_lock"}


def test_optunas_private_names_are_where_they_were(tmp_path):
    """A study has its storage and number, a trial its number, and a storage that was opened by its URL a backend."""
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert isinstance(study._storage, BaseStorage)
    assert study._storage.get_study_name_from_id(study._study_id) == study.study_name
    assert study._storage.get_trial(study.trials[0]._trial_id).value == 1.0
    opened = optuna.storages.get_storage("sqlite://")
    assert isinstance(opened._backend, RDBStorage)
    close_storage(opened)
    lock = FileLock(tmp_path / "lock")
    journal = JournalStorage(
        JournalFileBackend(str(tmp_path / "journal"), lock_obj=lock)
    )
    lock.acquire()
    close_storage(journal)
    assert not lock.is_locked


def test_optunas_private_signatures_are_what_they_were():
    """A trial is made from a study and a number; a storage makes one from a template, marks it, and ends it."""
    expected = {
        optuna.Trial.__init__: ["self", "study", "trial_id"],
        BaseStorage.create_new_trial: ["self", "study_id", "template_trial"],
        BaseStorage.set_trial_user_attr: ["self", "trial_id", "key", "value"],
        BaseStorage.set_trial_state_values: ["self", "trial_id", "state", "values"],
    }
    assert {
        method: list(inspect.signature(method).parameters) for method in expected
    } == expected


@pytest.mark.parametrize("url", [None, "sqlite://"])
def test_a_trial_begins_with_its_attributes_and_its_rate(url):
    """It runs, holds from its first moment what it was given, and its sampler is not asked for a given rate."""
    storage = InMemoryStorage() if url is None else optuna.storages.get_storage(url)
    study = optuna.create_study(
        storage=storage, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    trial = begin_trial(study, {"rank": 4}, {"x": -7.5})
    (found,) = study.get_trials()
    assert (found.number, found.state, found.user_attrs) == (
        trial.number,
        TrialState.RUNNING,
        {"rank": 4},
    )
    assert trial.suggest_float("x", -9.0, -1.0) == -7.5
    study.tell(trial, 1.0)
    assert study.trials[0].params == {"x": -7.5}
    close_storage(storage)


@pytest.mark.parametrize("ended", [False, True])
def test_a_trial_of_another_process_is_marked_and_failed(ended):
    """A running trial fails with its mark; one that ended in the meantime stays as it is."""
    study = optuna.create_study()
    trial = begin_trial(study, {}, {})
    (found,) = study.get_trials()
    if ended:
        study.tell(trial, 1.0)
    fail_killed(study, found)
    assert study.trials[0].state == (TrialState.COMPLETE if ended else TrialState.FAIL)
    assert study.trials[0].user_attrs == ({} if ended else {"killed": True})


def test_optunas_private_names_are_used_in_one_file():
    """No other file of the package reads an attribute of one of these names."""
    package = Path(rankaware_optim.__file__).parent
    uses = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in PRIVATE)
        or (isinstance(node, ast.Constant) and node.value in PRIVATE)
    }
    assert uses == {"calibration/_storage.py"}
