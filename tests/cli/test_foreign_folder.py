"""The script `rankaware` in a folder of someone else: nothing there is run, unless an argument names a module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rankaware_optim.cli import main

from ..helpers.recipes import RECIPE

# What the commands import, what they look for in other packages, and modules of Python that load late.
SHADOWS = """
    alembic click filelock huggingface_hub jinja2 lazy_loader matplotlib msgspec numpy optuna packaging peft ray rich
    safetensors sklearn sqlalchemy timm tomli tomli_w torch torch_optimizer transformers
    csv json logging multiprocessing pickle queue random secrets signal socket sqlite3 tempfile threading uuid
"""
MARKING = 'open(__file__ + ".was_run", "w").close()\n'
LAW = "from rankaware_optim.laws import Constant\nclass Mine(Constant):\n    name = 'mine'\n"
OPTIMIZER = "import torch\nclass AdamW(torch.optim.AdamW):\n    pass\n"
LOOP = """
def train(trial):
    trial.optimizer(Model(trial.rank))
    import late
    for _ in range(trial.steps):
        yield 1.0

from torch import nn
import torch

class Model(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, 8)), nn.Parameter(torch.zeros(8, rank))
        self.r, self.scaling = rank, 1.0
"""
SWEEP = "model,rank,alpha,lr,loss,fan_in\n" + "".join(
    f"m,{rank},{rank},{lr},{loss},64\n"
    for rank in (4, 64)
    for lr, loss in ((1e-4, 2.0), (1e-3, 1.0), (1e-2, 1.5), (1e-1, 3.0))
)
PLAIN = [
    "--version",
    "convert 2e-4 --from r=16,alpha=32 --to r=64",
    "convert 2e-4 --from . --to r=64",
    "diff digits.toml digits.toml",
    "fit sweep.csv -o fitted.toml --force",
    "inspect .",
    "lr digits.toml --rank 8",
    "plot digits.toml -o plot.png --force",
    "report digits.toml -o page.html --force",
    "show digits.toml",
    "suggest .",
]
SHORT = "--ranks 2,4 --steps 2 --trials 2 -o r.toml"
NAMING = [
    "convert 2e-4 --from r=16,alpha=32 --to r=64 --law mine_law:Mine",
    "fit sweep.csv --law mine_law:Mine",
    "fit sweep.csv --optimizer mine_optimizer:AdamW",
    "inspect . --lr 1e-3 --tuned-at r=4,alpha=4 --law mine_law:Mine",
    "suggest . --optimizer mine_optimizer:AdamW",
    f"calibrate loop:train {SHORT}",
    f"calibrate loop:train {SHORT} --workers 2",
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with an adapter, a recipe, a sweep, the user's modules, and a module of every name in `SHADOWS`."""
    folder = tmp_path_factory.mktemp("foreign")
    RECIPE.save(folder / "digits.toml")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    factors = {
        "lora_A": np.zeros((8, 32), np.float32),
        "lora_B": np.zeros((48, 8), np.float32),
    }
    tensors = {
        f"base_model.model.q.{name}.weight": value for name, value in factors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "sweep.csv").write_text(SWEEP)
    users = {"mine_law": LAW, "mine_optimizer": OPTIMIZER, "loop": LOOP, "late": ""}
    for name, text in users.items():
        (folder / f"{name}.py").write_text(text)
    for name in SHADOWS.split():
        (folder / f"{name}.py").write_text(MARKING)
    return folder


def environment() -> dict[str, str]:
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))}


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The installed script, in `folder`."""
    script = shutil.which("rankaware", path=str(Path(sys.executable).parent))
    assert script is not None
    return subprocess.run(
        [script, *command.split()],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )


# A script that calls the command several times: like the installed one it has its own folder first in sys.path.
SEVERAL = """
import glob, json, sys, traceback
from rankaware_optim.cli import main
for command in sys.argv[1:]:
    code = 0
    try:
        main(command.split(), prog_name="rankaware")
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = traceback.format_exc()
    print("RAN", json.dumps([command, code or 0, glob.glob("*.was_run")]))
"""


def run_in_turn(commands: list[str], folder: Path, script: Path) -> list:
    """The commands in one process: each with its exit code, and the modules of `folder` that were run by then."""
    script.write_text(SEVERAL)
    done = subprocess.run(
        [sys.executable, script, *commands],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RAN ")]
    assert len(lines) == len(commands), done.stderr
    return [json.loads(line.removeprefix("RAN ")) for line in lines]


def marks(folder: Path) -> list[str]:
    """The modules of `folder` that were run since the last call."""
    found = sorted(folder.glob("*.py.was_run"))
    for mark in found:
        mark.unlink()
    return [mark.name.partition(".")[0] for mark in found]


def test_commands_run_nothing_of_the_folder_they_stand_in(foreign, tmp_path):
    """No file there that is called like a module is run, by a command or by its help."""
    commands = ["--help", *(f"{name} --help" for name in main.commands), *PLAIN]
    for command, code, ran in run_in_turn(commands, foreign, tmp_path / "several.py"):
        assert ran == [], command
        assert code == 0 or command.startswith("plot"), command


@pytest.mark.parametrize("command", ["--help", "show digits.toml", "fit sweep.csv"])
def test_the_installed_script_runs_nothing_of_its_folder_either(command, foreign):
    """The same in a process of the script's own, light or with torch."""
    done = run(command, foreign)
    assert (done.returncode, marks(foreign)) == (0, []), done.stderr


def test_every_command_is_tried():
    """Each command has its help above, and a call of its own."""
    assert {line.split()[0] for line in [*PLAIN, *NAMING]} == {
        *main.commands,
        "--version",
    }


def shadowing(ran: list[str]) -> list[str]:
    """Which of the modules that were run are called like an installed one."""
    return [name for name in ran if find_spec(name) is not None]


def test_a_law_or_optimizer_of_the_folder_is_found_and_shadows_nothing(
    foreign, tmp_path
):
    """A module that the user names is used, and no other module of the folder."""
    commands = [command for command in NAMING if not command.startswith("calibrate")]
    for command, code, _ in run_in_turn(commands, foreign, tmp_path / "several.py"):
        assert code == 0, command
    assert shadowing(marks(foreign)) == []


@pytest.mark.parametrize(
    "command", [name for name in NAMING if name.startswith("calibrate")]
)
def test_a_loop_of_the_folder_is_found_and_shadows_nothing(command, foreign):
    """A loop is used, its late imports and workers too, and no other module of the folder."""
    done = run(command, foreign)
    assert done.returncode == 0, done.stderr
    for made in foreign.glob("r.*"):
        made.unlink()
    ran = marks(foreign)
    assert shadowing(ran) == []


def test_the_check_can_fail(foreign):
    """`python -m` puts the folder first, by Python's own rule, and then its modules are run."""
    command = [sys.executable, "-m", "rankaware_optim", "--help"]
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    subprocess.run(command, cwd=foreign, env=environment, capture_output=True)
    assert marks(foreign)
