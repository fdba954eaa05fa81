"""The example for Ray, on a cluster of two nodes, one of which is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ...helpers.examples import EXAMPLES
from .conftest import NODE

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
TRIALS = 16


def trials_of(journal):
    """The trials that ran to an end, pruned ones included."""
    if not journal.exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(storage)
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return [
        trial
        for name in names
        for trial in optuna.load_study(study_name=name, storage=storage).get_trials(
            states=ended
        )
    ]


def test_a_killed_node_loses_nothing(cluster, tmp_path):
    """Two nodes share the trials; one that is killed costs no finished trial, and its task runs again."""
    source = (EXAMPLES / "calibrate_ray.py").read_text()
    script, journal = tmp_path / "script.py", tmp_path / "study.journal"
    assert "steps=20," in source
    script.write_text(source.replace("steps=20,", "steps=600,"))
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {
        **os.environ,
        "RAY_ADDRESS": cluster.address,
        "PYTHONPATH": paths,
    }
    process = subprocess.Popen(
        [sys.executable, str(script), str(journal)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 300
        while len(trials_of(journal)) < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        second = next(node for node in cluster.list_all_nodes() if not node.head)
        cluster.remove_node(second, allow_graceful=False)
        before = trials_of(journal)
        assert len(before) < TRIALS
        cluster.add_node(**NODE)
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "rank 8" in out
    after = trials_of(journal)
    assert [trial for trial in after if trial in before] == before
    assert len(after) >= TRIALS
    assert len(
        {
            (*map(trial.user_attrs.get, ("rank", "seed")), *trial.params.values())
            for trial in after
        }
    ) == len(after)
