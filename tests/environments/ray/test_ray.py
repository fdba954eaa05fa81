"""Calibrations whose workers are tasks of a Ray cluster: shared, broken off, killed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest
import torch
from optuna.storages import InMemoryStorage

import rankaware_optim as ra
from rankaware_optim.calibration import RayExecutor
from rankaware_optim.calibration._trials import Trials

from ...cli.test_calibrate import (
    LOOP,
    assert_shared,
    call,
    ended,
    running_or_done,
    started,
    trials_of,
    wait_until,
)
from .conftest import NODE

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
COMMAND = ["ray_loops:train", "--steps", 10, "-o", "r.toml", "--ranks", "2,32"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, which every node sees, with a loop whose runs take 0.4 s."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray_loops", raising=False)
    invalidate_caches()
    (tmp_path / "ray_loops.py").write_text(LOOP.replace("PAUSE", "0.04"))
    yield tmp_path
    sys.modules.pop("ray_loops", None)


def calibrate(cluster, train=None, **options):
    options = {
        "executor": RayExecutor(address=cluster.address),
        "storage": "s.journal",
        "trials": 8,
        **options,
    }
    train = train or import_module("ray_loops").train
    return ra.calibrate(train, torch.optim.AdamW, ranks=(2, 32), steps=10, **options)


@contextmanager
def another_node(cluster, **options):
    """A third node, for a while."""
    node = cluster.add_node(**NODE | options)
    try:
        yield
    finally:
        cluster.remove_node(node, allow_graceful=False)
        cluster.wait_for_nodes(60)  # Ray takes a while to know that it is gone


def test_two_nodes_share_the_trials(cluster, folder):
    """Each node has a worker; together they run the number asked for, and no rank, seed and rate twice."""
    recipe = calibrate(cluster, trials=24)
    assert_shared(trials_of("s.journal", "calibration"), 24)
    assert len(recipe.tensors["lr"]) == 24


def test_the_command_runs_there_too(cluster, folder):
    """`rankaware calibrate --ray` writes the recipe, with a line for every trial; run again it changes nothing."""
    process = started(*COMMAND, "--trials", 12, "--ray", cluster.address)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert sum(line.startswith("trial ") for line in err.splitlines()) == 12
    assert_shared(trials_of("r.journal", "r"), 12)
    before = Path("r.toml").read_bytes()
    ended(started(*COMMAND, "--trials", 12, "--ray", cluster.address))
    assert Path("r.toml").read_bytes() == before


def test_a_script_needs_no_module(cluster, folder):
    """What a script defines goes to the nodes with it, and executor="ray" finds the cluster that RAY_ADDRESS names."""
    call = "ra.calibrate(train, 'AdamW', ranks=(2, 32), steps=10, trials=6, storage='s.journal', executor='ray')"
    script = f"{LOOP.replace('PAUSE', '0.04')}\nimport rankaware_optim as ra\nif __name__ == '__main__':\n    print({call})"
    Path("script.py").write_text(
        script.replace("Path(__file__).parent", f"Path({str(folder)!r})")
    )
    environment = {
        **os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "script.py"], check=True, env=environment, timeout=300
    )
    assert len(Trials.read(trials_of("s.journal", "calibration")).counted()) == 6


def test_a_killed_node_loses_nothing(cluster, folder):
    """A node that is killed on the way costs no finished trial; what ran there is run again, as many in all as ever."""
    second = next(node for node in cluster.list_all_nodes() if not node.head)
    process = started(*COMMAND, "--trials", 24, "--ray", cluster.address)
    try:
        wait_until(
            lambda: (
                len({t.worker for t in running_or_done("r.journal", "r").counted()})
                == 2
            )
        )
        cluster.remove_node(second, allow_graceful=False)
        before = [t for t in trials_of("r.journal", "r") if t.state.is_finished()]
        ended(process)
    finally:
        process.kill()
        process.communicate()
        cluster.wait_for_nodes(60)
        cluster.add_node(**NODE)
    after = trials_of("r.journal", "r")
    assert [t.datetime_complete for t in after[: len(before)] if t in before] == [
        t.datetime_complete for t in before
    ]
    records = Trials.read(after)
    ran, killed = records.counted(), [t for t in records if t.killed]
    assert len(ran) == 24 > len(before)
    assert len({(*t.setting, t.x) for t in ran}) == 24
    assert not records.running()
    assert [t.number for t in killed] == [
        t.retry_of for t in records if t.retry_of is not None
    ]
    assert len(ra.Recipe.load("r.toml").tensors["lr"]) == 24


def test_each_worker_has_a_gpu_of_its_own(cluster, folder):
    """On a node that counts two GPUs there are two workers, and each sees one of them."""
    with another_node(cluster, num_cpus=2, num_gpus=2):
        calibrate(cluster)
    seen = [json.loads(path.read_text()) for path in folder.glob("seen-*")]
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in seen) == ["0", "1"]


def test_one_is_started_for_the_call(folder):
    """`--ray local` starts a cluster on this machine, and ends it."""
    ended(
        started(
            *COMMAND,
            "--trials",
            6,
            "--ray",
            "local",
            "--workers",
            1,
            env={"PROCESSES": "1"},
        )
    )
    assert len(ra.Recipe.load("r.toml").tensors["lr"]) == 6


def test_ctrl_c_ends_it_in_a_sentence(cluster, folder):
    """Ctrl-C ends with code 130, and the same command goes on."""
    process = started(
        *COMMAND, "--trials", 500, "--ray", cluster.address, start_new_session=True
    )
    wait_until(lambda: len(running_or_done("r.journal", "r").counted()) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "The same command continues where it stopped." in err
    assert "Traceback" not in err
    done = len(Trials.read(trials_of("r.journal", "r")).counted())
    ended(started(*COMMAND, "--trials", done + 2, "--ray", cluster.address))
    assert len(ra.Recipe.load("r.toml").tensors["lr"]) == done + 2


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_said(address, folder, monkeypatch):
    """One sentence that names the address; finished trials stay."""
    monkeypatch.setenv("PROCESSES", "1")
    assert call(*COMMAND, "--trials", 2).exit_code == 0
    before = Path("r.journal").read_bytes(), Path("r.toml").read_bytes()
    done = call(*COMMAND, "--trials", 4, "--ray", address)
    assert done.exit_code == 1
    assert f"Error: The Ray cluster at {address!r} cannot be reached: " in done.stderr
    assert (
        len(
            [line for line in done.stderr.splitlines() if not line.startswith("trial ")]
        )
        == 1
    )
    assert len(Trials.read(trials_of("r.journal", "r")).counted()) == 2
    assert Path("r.toml").read_bytes() == before[1]


@pytest.mark.parametrize("storage", [None, "sqlite:///s.db", InMemoryStorage()])
def test_a_storage_that_only_this_process_has_is_refused(storage, folder):
    """Memory, SQLite and an object are, before Ray is started."""
    with pytest.raises(
        ra.CalibrationError,
        match="Give as storage the path of a journal in a folder that all",
    ):
        ra.calibrate(
            import_module("ray_loops").train,
            "AdamW",
            ranks=(2, 32),
            steps=10,
            storage=storage,
            executor="ray",
        )
    assert not Path("s.db").exists()


@pytest.mark.parametrize("options", [["--devices", "0"], ["--threads", "1"]])
def test_ray_places_its_workers_itself(options, folder, monkeypatch):
    """--devices and --threads do not go with --ray."""
    done = call(*COMMAND, "--ray", "local", *options)
    assert done.exit_code == 1
    assert (
        done.stderr
        == "Error: Ray gives the workers their GPUs and threads. Leave --devices and --threads out.\n"
    )


def test_other_code_on_a_node_is_refused(cluster, folder, monkeypatch):
    """A node whose own loop differs is named, and it runs no trial; with the same code the call goes on."""
    train = import_module("ray_loops").train
    calibrate(cluster, train, trials=2)
    (folder / "other").mkdir()
    (folder / "other" / "ray_loops.py").write_text(LOOP.replace("PAUSE", "0.01"))
    monkeypatch.chdir("/")  # Ray lets its workers import from where the call was made
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder / "other"), *filter(None, sys.path)])
    }
    options = {"storage": folder / "s.journal", "trials": 4}
    refused = pytest.raises(
        ra.CalibrationError, match=r"runs different code from .*: its source's hash="
    )
    with another_node(cluster, num_gpus=1, env_vars=environment), refused:
        calibrate(cluster, train, **options)
    assert len(trials_of(str(folder / "s.journal"), "calibration")) == 2
    monkeypatch.chdir(folder)
    assert len(calibrate(cluster, train, **options).tensors["lr"]) == 4


FAILING = {
    "raising": (
        "def train(trial):\n    1 / 0\n    yield",
        ZeroDivisionError,
        "division by zero",
    ),
    "not a generator": (
        "def train(trial):\n    return 1",
        ra.CalibrationError,
        "returned a int instead of a generator",
    ),
}


@pytest.mark.parametrize(("source", "error", "message"), FAILING.values(), ids=FAILING)
def test_what_train_raises_there_is_raised_here(
    source, error, message, cluster, folder
):
    """The first worker's error ends the call, as it would in one process."""
    (folder / "ray_loops.py").write_text(source)
    with pytest.raises(error, match=message):
        calibrate(cluster)


def test_what_cannot_be_sent_is_refused(cluster, folder):
    """A loop that holds a lock does not reach a node."""
    import threading

    lock = threading.Lock()

    def train(trial):
        with lock:
            yield 1.0

    with pytest.raises(
        ra.CalibrationError,
        match="train cannot be sent to Ray's workers: Could not serialize",
    ):
        calibrate(cluster, train)


def test_a_module_that_a_node_lacks_is_named(cluster, folder, monkeypatch):
    """A loop whose module is only in this process's memory is refused with its name."""
    from types import ModuleType

    module = ModuleType("nowhere_else")
    exec("def train(trial):\n    yield 1.0", module.__dict__)
    monkeypatch.setitem(sys.modules, "nowhere_else", module)
    with pytest.raises(
        ra.CalibrationError,
        match=r"could not load train: .*No module named 'nowhere_else'",
    ):
        calibrate(cluster, module.train)
