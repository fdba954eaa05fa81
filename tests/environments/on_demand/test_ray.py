"""Tests of the example for Ray on a cluster of two nodes, one of which is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.cluster_utils import Cluster

from ...helpers.examples import EXAMPLES

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
TRIALS = 16


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Cluster]:
    """Yield a cluster of two nodes with one core each. A run waits until both nodes are at work."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PROCESSES", "2")
    head = {**NODE, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(**NODE)
    yield made
    made.shutdown()


def trials_of(journal):
    """Return the completed and pruned trials of every study in the journal."""
    if not journal.exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(journal)))
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    found = []
    for name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        found += study.get_trials(states=ended)
    return found


def test_a_killed_node_loses_nothing(cluster, tmp_path):
    """If one of two nodes is killed, no finished trial is lost or repeated, and the other trials still run."""
    source = (EXAMPLES / "calibrate_ray.py").read_text()
    script, journal = tmp_path / "script.py", tmp_path / "study.journal"
    assert "steps=20," in source
    script.write_text(source.replace("steps=20,", "steps=600,"))
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
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
    points = {
        (*map(trial.user_attrs.get, ("rank", "seed")), *trial.params.values())
        for trial in after
    }
    assert len(points) == len(after)
