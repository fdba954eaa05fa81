"""`executor=`: who may run the trials elsewhere, and what each of them gets. Ray itself: tests/environments/ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from optuna.storages import InMemoryStorage

import rankaware_optim as ra
from rankaware_optim import CalibrationError
from rankaware_optim.calibration import RayExecutor
from rankaware_optim.calibration._ray import share_out
from rankaware_optim.calibration._storage import (
    check_shared,
    journal_head,
    shared_storage,
)

from ..helpers.calibrations import AdamW, Net, calibrate, made_up

GPUS, CORES = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0}
#       the nodes' resources, workers, GPUs of each: workers, GPUs and cores of each
SHARES = [
    ([CORES], None, None, (8, 0, 2)),
    ([CORES, {"CPU": 2.0}], None, None, (9, 0, 2)),
    ([{"CPU": 1.0}, {"CPU": 1.0}], None, None, (2, 0, 1)),
    ([{"CPU": 3.0}], None, None, (1, 0, 3)),
    ([CORES], 3, None, (3, 0, 2)),
    ([CORES], 16, None, (16, 0, 1)),
    ([{"CPU": 2.0}], 2, None, (2, 0, 1)),
    ([GPUS], None, None, (4, 1, 4)),
    ([CORES, GPUS], None, None, (4, 1, 4)),
    ([GPUS, {"CPU": 8.0, "GPU": 8.0}], None, None, (12, 1, 1)),
    ([GPUS, {"GPU": 8.0}], None, None, (4, 1, 4)),
    ([GPUS], 2, None, (2, 1, 4)),
    ([GPUS], None, 2, (2, 2, 8)),
    ([GPUS], None, 0.5, (8, 0.5, 2)),
    ([GPUS], None, 0, (8, 0, 2)),
    ([CORES], 4, 1, (4, 1, 1)),
]


@pytest.mark.parametrize(("nodes", "workers", "gpus", "share"), SHARES)
def test_a_cluster_is_shared_out(nodes, workers, gpus, share):
    """As many workers as the nodes hold, or as were asked for, each with what the scarcest node leaves it."""
    assert share_out(nodes, workers, gpus) == share


@pytest.mark.parametrize(
    ("nodes", "gpus"), [([CORES], 1), ([GPUS], 8), ([], None), ([{"GPU": 1.0}], None)]
)
def test_a_cluster_that_holds_no_worker_is_refused(nodes, gpus):
    """Where no node has the GPUs and a core."""
    with pytest.raises(CalibrationError, match="No node of the Ray cluster"):
        share_out(nodes, None, gpus)


BAD = [
    (lambda: calibrate(made_up(), executor="dask"), "executor is 'dask'"),
    (lambda: calibrate(made_up(), executor=True), "executor is True"),
    (lambda: RayExecutor(workers=0), "workers is 0"),
    (lambda: RayExecutor(workers=1.5), r"workers is 1\.5"),
    (lambda: RayExecutor(gpus=-1), "gpus is -1"),
    (lambda: RayExecutor(gpus="all"), "gpus is 'all'"),
    (lambda: shared_storage(None), "no storage was given"),
    (lambda: shared_storage(InMemoryStorage()), "an object of this process"),
    (lambda: shared_storage("sqlite:///study.db"), "cannot share SQLite"),
    (lambda: shared_storage("sqlite+pysqlite:///study.db"), "cannot share SQLite"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_cannot_be_is_refused(make, message):
    """Other executors, impossible numbers, and storages that only this process can open."""
    with pytest.raises(CalibrationError, match=message):
        make()


def test_a_model_in_place_stays_here():
    """calibrate_in_place takes no executor, and leaves the model alone."""
    model = Net(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="trains the model of this process"):
        ra.calibrate_in_place(
            model, lambda model, i: 0.0, AdamW, ranks=(4, 16), steps=5, executor="ray"
        )
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    """Before a study is made."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        CalibrationError,
        match=r'not installed\. In a clone of this package: pip install "\.\[ray\]"',
    ):
        calibrate(made_up(), executor="ray", storage=tmp_path / "s.journal")
    assert list(tmp_path.iterdir()) == []


def test_storages_have_one_name_everywhere(monkeypatch, tmp_path):
    """A path is made absolute, a URL is left as it is."""
    monkeypatch.chdir(tmp_path)
    assert shared_storage(Path("study.journal")) == str(tmp_path / "study.journal")
    assert (
        shared_storage("postgresql+psycopg://me@there/db")
        == "postgresql+psycopg://me@there/db"
    )


def test_a_journal_of_the_same_name_is_not_the_same(tmp_path):
    """A machine that has no such journal, or another one under its name, is named."""
    paths = [str(tmp_path / name) for name in ("here.journal", "there.journal")]
    for path in paths:
        calibrate(made_up(), trials=2, storage=path)
    head = journal_head(paths[0])
    check_shared(paths[0], head, "node 1")
    for other in (paths[1], str(tmp_path / "nowhere.journal")):
        with pytest.raises(
            CalibrationError,
            match="on node 1 is not the file with which the calibration",
        ):
            check_shared(other, head, "node 1")
    check_shared("postgresql+psycopg://me@there/db", b"", "node 1")
