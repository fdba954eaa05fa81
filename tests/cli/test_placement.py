"""`rankaware calibrate --workers --devices`: which worker sees which GPUs and takes how many threads."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from click.testing import CliRunner

import rankaware_optim as ra
from rankaware_optim.cli._main import main
from rankaware_optim.cli._workers import AUTO, chosen_devices, placed, visible_devices

from .test_calibrate import LOOP, ended, seen, started

#        workers, GPUs, cores, threads: what each worker sees and takes; None where nothing is set
PLACES = [
    (AUTO, [], 8, None, [(None, 2)] * 4),
    (AUTO, [], 3, None, [(None, None)]),
    (AUTO, [], 1, None, [(None, None)]),
    (AUTO, ["0"], 8, None, [("0", None)]),
    (AUTO, ["0", "1", "2", "3"], 16, None, [("0", 4), ("1", 4), ("2", 4), ("3", 4)]),
    (AUTO, ["2", "GPU-5f3a"], 2, None, [("2", 1), ("GPU-5f3a", 1)]),
    (AUTO, ["0", "1"], 64, 3, [("0", 3), ("1", 3)]),
    (1, [], 8, None, [(None, None)]),
    (1, [], 8, 5, [(None, 5)]),
    (1, ["0", "1"], 8, None, [("0,1", None)]),
    (2, [], 8, None, [(None, 4)] * 2),
    (2, ["0", "1", "2", "3"], 8, None, [("0,1", 4), ("2,3", 4)]),
    (2, ["0", "1", "2"], 8, None, [("0", 4), ("1,2", 4)]),
    (4, ["0", "1"], 8, None, [("0", 2), ("0", 2), ("1", 2), ("1", 2)]),
    (3, ["7"], 2, None, [("7", 1)] * 3),
]


@pytest.mark.parametrize(("workers", "devices", "cores", "threads", "places"), PLACES)
def test_gpus_and_cores_are_dealt_out(workers, devices, cores, threads, places):
    """Every GPU has a worker and every worker a GPU where there is any; workers share the cores."""
    found = placed(workers, devices, cores, threads)
    assert [
        (p.get("CUDA_VISIBLE_DEVICES"), p.get("OMP_NUM_THREADS")) for p in found
    ] == [(seen, taken and str(taken)) for seen, taken in places]


VISIBLE = [
    ({}, 0, []),
    ({}, 3, ["0", "1", "2"]),
    ({"CUDA_VISIBLE_DEVICES": "2,5"}, 2, ["2", "5"]),
    ({"CUDA_VISIBLE_DEVICES": "GPU-5f3a, MIG-1c"}, 2, ["GPU-5f3a", "MIG-1c"]),
    ({"CUDA_VISIBLE_DEVICES": ""}, 0, []),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, 0, []),
    ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, 1, ["1"]),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, 0, ["0", "1"]),  # torch without CUDA cannot tell
]


@pytest.mark.parametrize(("environment", "count", "names"), VISIBLE)
def test_visible_gpus_have_the_names_of_cuda(environment, count, names):
    """CUDA_VISIBLE_DEVICES names them where it is set, else they are numbered."""
    assert visible_devices(environment, count) == names


BAD = [
    (
        lambda: visible_devices({"CUDA_VISIBLE_DEVICES": "0,9"}, 1),
        "torch finds 1 of these GPUs",
    ),
    (
        lambda: chosen_devices(("0", "7"), ["0", "1"]),
        "There is no GPU 7 here: the visible ones are 0, 1.",
    ),
    (lambda: chosen_devices(("0",), []), "There is no GPU 0 here: no GPU is visible."),
    (lambda: chosen_devices(("1", "1"), ["0", "1"]), "has a GPU twice"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_gpus_that_are_not_there_are_refused(make, message):
    """The error names them and those that are there."""
    with pytest.raises(ra.CalibrationError, match=message):
        make()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with a loop that writes down what its process sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "seeing_loops", raising=False)
    (tmp_path / "seeing_loops.py").write_text(LOOP.replace("PAUSE", "0.001"))
    return tmp_path


COMMAND = [
    "seeing_loops:train",
    "--steps",
    10,
    "-o",
    "r.toml",
    "--ranks",
    "2,32",
    "--trials",
    12,
]


def test_workers_see_their_own_gpus(folder):
    """Each process of the command, its own first one too, sees the GPUs and threads dealt to it, and no others."""
    env = {"CUDA_VISIBLE_DEVICES": "4,6,7", "PROCESSES": "2"}
    ended(started(*COMMAND, "--devices", "7,4", env=env))
    assert seen(folder, "CUDA_VISIBLE_DEVICES") == ["4", "7"]
    assert list(map(int, seen(folder, "OMP_NUM_THREADS"))) == seen(folder, "threads")
    assert len(ra.Recipe.load("r.toml").tensors["lr"]) == 12


@pytest.mark.parametrize(
    "options", [["--devices", "0,9"], ["--devices", "9", "--workers", 2]]
)
def test_a_gpu_that_is_not_there_ends_the_command(options, folder, monkeypatch):
    """One sentence, before any worker starts or a study is made."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    done = CliRunner().invoke(main, ["calibrate", *map(str, [*COMMAND, *options])])
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: There is no GPU 9 here: the visible ones are 0, 1. Give others, or leave --devices out.\n"
    )
    assert sorted(p.name for p in folder.iterdir()) == ["seeing_loops.py"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


ALONE = [([], "0,1", None), (["--devices", "1", "--threads", "1"], "1", 1)]


@pytest.mark.parametrize(("options", "gpus", "threads"), ALONE)
def test_a_single_worker_is_this_process(options, gpus, threads, folder, monkeypatch):
    """It sees all visible GPUs or those given, and leaves the process's variables as they were."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = CliRunner().invoke(main, ["calibrate", *map(str, COMMAND), *options])
    assert done.exit_code == 0, done.output
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]) == (
        "0,1",
        "2",
    )
    assert seen(folder, "CUDA_VISIBLE_DEVICES") == [gpus]
    assert seen(folder, "threads") == [threads or torch.get_num_threads()]
