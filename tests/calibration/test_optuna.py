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
from rankaware_optim.calibration._storage import begin_trial, close_storage

PRIVATE = {"_storage", "_study_id", "_backend", "_lock"}


def test_optunas_private_names_are_where_they_were(tmp_path):
    """A study has its storage and number, and a storage that was opened by its URL a backend."""
    study = optuna.create_study()
    assert isinstance(study._storage, BaseStorage)
    assert study._storage.get_study_name_from_id(study._study_id) == study.study_name
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
    """A trial is made from a study and a number, and a storage makes one from a template."""
    expected = {
        optuna.Trial.__init__: ["self", "study", "trial_id"],
        BaseStorage.create_new_trial: ["self", "study_id", "template_trial"],
    }
    assert {
        method: list(inspect.signature(method).parameters) for method in expected
    } == expected


@pytest.mark.parametrize("url", [None, "sqlite://"])
def test_a_trial_begins_with_its_attributes(url):
    """It runs, and holds from its first moment what it was given."""
    storage = InMemoryStorage() if url is None else optuna.storages.get_storage(url)
    study = optuna.create_study(storage=storage)
    trial = begin_trial(study, {"rank": 4})
    (found,) = study.get_trials()
    assert found.number == trial.number
    assert found.state == TrialState.RUNNING
    assert found.user_attrs == {"rank": 4}
    study.tell(trial, 1.0)
    assert study.trials[0].value == 1.0
    close_storage(storage)


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
