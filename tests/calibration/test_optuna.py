"""Tests that the private names of Optuna that `_storage.py` uses work, and that no other file uses them."""

from __future__ import annotations

import ast
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

import rankaware_optim
from rankaware_optim.calibration._storage import begin_trial, close_storage

PRIVATE = {"_storage", "_study_id", "_backend", "_lock", "_file_path"}


@pytest.mark.parametrize("url", [None, "sqlite://"])
def test_a_trial_begins_with_its_attributes(url):
    """A trial that `begin_trial` creates is running and already has its attributes."""
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
    """`_storage.py` is the only file of the package that uses private names of Optuna."""
    package = Path(rankaware_optim.__file__).parent
    uses = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in PRIVATE)
        or (isinstance(node, ast.Constant) and node.value in PRIVATE)
    }
    assert uses == {"calibration/_storage.py"}
