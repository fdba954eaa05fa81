"""Tests of `rankaware calibrate`, with one worker or several, and of continuing a calibration that was interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner

import rankaware_optim as ra
from rankaware_optim.calibration import TRIALS_PER_RANK
from rankaware_optim.calibration._storage import close_storage, open_storage
from rankaware_optim.cli import _calibrate
from rankaware_optim.cli._main import main

from ..helpers.calibrations import counted, states

LOOP = """
import json, math, os, time, warnings
from pathlib import Path
import torch
from torch import nn


class Pair(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=rank is None)
        if rank is not None:
            self.lora_A = nn.Parameter(torch.randn(rank, 8))
            self.lora_B = nn.Parameter(torch.zeros(8, rank))
            self.r, self.scaling = rank, 1.0


def train(trial):
    trial.optimizer(Pair(trial.rank))
    seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    here = Path(__file__).parent
    file = here / f"seen-{os.getpid()}"
    # Renamed once it is whole, since another process may read it at any moment.
    half = here / f"half-{os.getpid()}"
    half.write_text(json.dumps({**seen, "threads": torch.get_num_threads()}))
    half.rename(file)
    until = time.monotonic() + 200
    while len(list(here.glob("seen-*"))) < int(os.environ.get("PROCESSES", 1)) and time.monotonic() < until:
        time.sleep(0.05)
    u = math.log2(trial.lr) + 7
    for step in range(trial.steps):
        time.sleep(PAUSE)
        yield 2.3 - step * 0.2 / (1 + u * u) + 0.01 * torch.rand(1).item()


def warns(trial):
    warnings.warn(f"the disk of {os.getpid()} is slow")
    yield from train(trial)


NUMBER = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the current directory, which has modules with training loops, of which some are broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "loops", raising=False)
    (tmp_path / "loops.py").write_text(LOOP.replace("PAUSE", "0"))
    (tmp_path / "slow_loops.py").write_text(LOOP.replace("PAUSE", "0.04"))
    (tmp_path / "broken_loops.py").write_text("import not_there_at_all\n")
    (tmp_path / "raising_loops.py").write_text("1 / 0\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "leaving_loops.py").write_text(
        "import loops, sys\n"
        "def train(trial):\n    yield from loops.train(trial)\n    sys.exit(0)\n"
    )
    return tmp_path


def call(*arguments):
    words = (word for argument in arguments for word in str(argument).split())
    return CliRunner().invoke(main, ["calibrate", *words])


QUICK = "loops:train --steps 10 -o made/r.toml"
OPTIONS = {  # the options of a command, and a function that returns pairs of a found and a wanted value
    "--ranks 2,4 --trials 6 --batch 8": lambda r: [
        (r.name, "r"),
        (r.ranks, (2, 4)),
        ((r.steps, r.batch, r.warmup), (10, 8, 0.0)),
        (len(r.tensors["lr"]), 6),
    ],
    "--ranks 2,8 --trials 5 --full-trials 1 --seeds 5 --lr-range 1e-4,1e-1 --optimizer sgd"
    " --law loraplus --name mine --storage kept/here.journal": lambda r: [
        (r.name, "mine"),
        (r.optimizer.endswith("SGD"), True),
        (r.law.law, ra.LoRAPlus()),
        (r.tensors["rank"].tolist()[-1], 0),
        (len(r.tensors["lr"]), 6),
        ({*r.tensors["seed"].tolist()}, {5}),
        (Path("kept/here.journal").is_file(), True),
    ],
    "--ranks 2,full --trials 4": lambda r: [(r.full_seen, True)],
    "--ranks 1,16 --target-steps 80 --trials 4": lambda r: [
        (r.steps, 80),
        (max(r.tensors["steps"].tolist()), 10),
    ],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_reaches_the_calibration(options, folder):
    """The recipe has the values of the command's options, and the command prints the recipe."""
    done = call(QUICK, options)
    assert done.exit_code == 0, done.output
    recipe = ra.Recipe.load("made/r.toml")
    for found, wanted in OPTIONS[options](recipe):
        assert found == wanted
    assert f"{recipe}\n" in done.output


def test_the_same_command_goes_on(folder):
    """Repeating a command changes nothing, and with a larger --trials only the additional trials run."""
    again = f"{QUICK} --ranks 2,4 --force --trials"
    assert call(again, 3).exit_code == 0
    first = Path("made/r.toml").read_bytes()
    assert call(again, 3).exit_code == 0
    assert Path("made/r.toml").read_bytes() == first
    assert call(again, 5).exit_code == 0
    assert len(ra.Recipe.load("made/r.toml").tensors["lr"]) == 5


def started(*arguments, env=(), **options):
    """Start the command in a separate process, with additional environment variables.

    Its first trial waits until the number of processes in the variable PROCESSES has begun a trial, so that every
    process has a share of the trials.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        **dict(env),
    }
    command = [
        sys.executable,
        "-m",
        "rankaware_optim",
        "calibrate",
        *map(str, arguments),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, **options
    )


def seen(folder: Path, name: str) -> list:
    """Return the values of a variable in the processes that ran `LOOP`, sorted."""
    return sorted(json.loads(path.read_text())[name] for path in folder.glob("seen-*"))


def ended(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def trials_of(storage: str, name: str) -> list[optuna.trial.FrozenTrial]:
    opened = open_storage(storage)
    try:
        return optuna.load_study(study_name=name, storage=opened).trials
    finally:
        close_storage(opened)


def assert_shared(trials, count: int) -> None:
    """Check that two processes ran `count` trials in total, or one more, and none of them twice."""
    ran = counted(trials)
    assert len(ran) in (count, count + 1)
    points = {
        (trial.user_attrs["rank"], trial.user_attrs["seed"], *trial.params.values())
        for trial in ran
    }
    assert len(points) == len(ran)
    assert "RUNNING" not in states(trials)


def shared(loop: str, *options) -> list:
    """Return the arguments of a calibration that several processes share."""
    return [loop, "--steps", 10, "-o", "r.toml", "--ranks", "2,32", *options]


def test_two_workers_share_the_trials(folder):
    """With --workers 2, two processes with a GPU each share the trials, and no trial is run twice.

    The warnings of both processes are printed.
    """
    process = started(
        *shared("slow_loops:warns", "--trials", 3, "--workers", 2),
        env={"PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "4,6"},
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_shared(trials_of("r.journal", "calibration"), 3)
    assert len(re.findall("[34] trials", out)) == 1
    assert len(set(re.findall(r"^note: the disk of (\d+) is slow$", err, re.M))) == 2
    assert seen(folder, "CUDA_VISIBLE_DEVICES") == ["4", "6"]


POSIX = pytest.mark.skipif(os.name != "posix", reason="processes get signals")
LONG = shared("slow_loops:train", "--trials", 500, "--workers", 2)


@pytest.mark.processes
@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_workers_in_a_sentence(number, folder):
    """Ctrl-C or SIGTERM ends all workers with one sentence and code 130, and no trial remains marked as running."""
    process = started(*LONG, start_new_session=True)
    until = time.monotonic() + 300
    while len(seen(folder, "threads")) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=300)  # until all workers have ended
    shown = ("calibrate: ", "lr is ", "trial ")
    lines = filter(None, err.splitlines())
    said = [line for line in lines if not line.startswith(shown)]
    assert process.returncode == 130, err
    assert len(said) == 1, err
    assert re.fullmatch(
        r"The calibration was interrupted after \d+ of 500 trials\. Run the same command again to continue where it stopped\.",
        said[0],
    )
    assert "RUNNING" not in states(trials_of("r.journal", "calibration"))


@pytest.mark.processes
@POSIX
def test_a_killed_first_worker_is_named(folder):
    """If a worker is killed, one sentence names the worker, the signal, the study and how to continue."""
    process = started(*LONG, start_new_session=True)
    until = time.monotonic() + 300
    while len(seen(folder, "threads")) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    [first] = (
        int(p.name.partition("-")[2]) for p in folder.glob("seen-*") if is_first(p)
    )
    os.kill(first, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    said = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert process.returncode == 1, err
    assert said == [
        "Error: Worker 1 of 2 was killed by SIGKILL, so the other workers were stopped. The finished trials are"
        " stored in r.journal. Run the same command again to continue the calibration."
    ]
    assert not Path("r.toml").exists()


def is_first(path: Path) -> bool:
    """Return whether the process that wrote this file is the first worker, which prints."""
    command = Path(f"/proc/{path.name.partition('-')[2]}/cmdline").read_bytes()
    return b"--quiet" not in command


@POSIX
def test_a_worker_that_hangs_is_stopped(monkeypatch):
    """A worker that ignores SIGTERM is killed after a short wait."""
    monkeypatch.setattr(_calibrate, "_GRACE_S", 0.5)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-c", deaf])
    time.sleep(0.5)
    _calibrate._end(worker)
    assert worker.wait(timeout=60) == -signal.SIGKILL


# --- errors ---------------------------------------------------------------------------------------------------------

RANKS = ["--ranks", "2,4", "--steps", 10, "-o", "r.toml"]
RUNS = 2 * TRIALS_PER_RANK  # the number of runs of a search at two ranks
BAD = [
    (["loops", *RANKS], "cannot be imported"),
    (["nowhere:train", *RANKS], "No module named 'nowhere'"),
    (["loops.py:train", *RANKS], "finetune:train"),
    (["script:train", *RANKS], "SystemExit: 0"),
    (["loops:NUMBER", *RANKS], "pass a function"),
    (["broken_loops:train", *RANKS], "not_there_at_all"),
    (["loops:train", *RANKS, "--trials", 0], "Error: trials=0 is not a whole number"),
    (["loops:train", *RANKS, "--optimizer", "unheard-of"], "Unknown optimizer"),
    (
        ["loops:train", *RANKS, "--storage", "no-such-db://here"],
        "Error: The study's storage no-such-db://here failed: ",
    ),
    (["loops:train", *RANKS, "--storage", "."], "storage="),
    (["loops:train", *RANKS, "--workers", 2], "in a shell"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_error_is_a_sentence(arguments, message, folder):
    """Bad input ends the command with code 1 and one line that says what is wrong, and no recipe is written."""
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not Path("r.toml").exists()


def test_a_loop_that_leaves_python_is_an_error(folder):
    """A training loop that calls sys.exit(0) ends the command with an error, because there is no recipe."""
    done = call("leaving_loops:train", *RANKS, "--quiet")
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert "leaving_loops:train called sys.exit(0)" in done.stderr
    assert not Path("r.toml").exists()


def test_ctrl_c_at_any_other_moment_is_a_word(folder):
    """Ctrl-C before the calibration has begun ends the command with the word "Interrupted." and code 130."""
    Path("stopped_loops.py").write_text("raise KeyboardInterrupt\n")
    done = call("stopped_loops:train", *RANKS)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_dry_run_prints_the_price_alone(folder):
    """With --dry-run, the command prints its cost or an error, and trains and writes nothing."""
    before = sorted(Path().iterdir())
    arguments = ["loops:train", "--ranks", "2,4", "--steps", "8", "-o", "r.toml"]
    done = call(*arguments, "--trials", "6", "--dry-run")
    price = "loops:train: 6 trials of 8 steps, at most 48 steps in all\n"
    assert (done.exit_code, done.stdout) == (0, price)
    assert call(*arguments, "--trials", "0", "--dry-run").exit_code == 1
    assert sorted(p for p in Path().iterdir() if p.name != "__pycache__") == before


def test_sigterm_is_an_interrupt_once():
    """The first SIGTERM raises KeyboardInterrupt, and further ones, as clusters send them, are ignored."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            _calibrate._interrupt(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


CLUSTERS = Path(__file__).parents[2] / "docs" / "clusters.md"


@pytest.mark.processes
def test_two_tasks_of_the_array_share_the_trials(tmp_path):
    """Two tasks of the SLURM script in docs/clusters.md share one study, and each writes the same recipe."""
    [script] = re.findall(
        r"^```bash\n(.*?)^```", CLUSTERS.read_text(encoding="utf-8"), re.M | re.S
    )
    (tmp_path / "finetune.sh").write_text(script)
    (tmp_path / "finetune.py").write_text(LOOP.replace("PAUSE", "0"))
    paths = {
        "PYTHONPATH": sys.path,
        "PATH": [str(Path(sys.executable).parent), os.environ["PATH"]],
    }
    common = {
        **os.environ,
        **{name: os.pathsep.join(filter(None, parts)) for name, parts in paths.items()},
    }
    tasks = [
        subprocess.Popen(
            ["bash", "finetune.sh"],
            cwd=tmp_path,
            env={**common, "PROCESSES": "2", "SLURM_ARRAY_TASK_ID": str(i), "SLURM_CPUS_PER_TASK": "1",
                 "CUDA_VISIBLE_DEVICES": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    assert [
        (task.communicate(timeout=300)[1], task.returncode)[1] for task in tasks
    ] == [0, 0]
    assert_shared(
        trials_of(str(tmp_path / "finetune.journal"), "calibration"),
        2 * TRIALS_PER_RANK,
    )
    first, second = (
        ra.Recipe.load(tmp_path / "recipes" / f"task-{i}.toml") for i in range(2)
    )
    assert first.fitted_lr == second.fitted_lr
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("seen-*")]
    assert sorted((one["CUDA_VISIBLE_DEVICES"], one["threads"]) for one in seen) == [
        ("0", 1),
        ("1", 1),
    ]
