"""Tests that `rankaware` runs no file of the current folder unless an argument names a module there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rankaware_optim.cli import main

from ..helpers.adapters import peft_folder
from ..helpers.recipes import RECIPE

pytestmark = pytest.mark.processes
# Packages that the commands import or look for, and modules of Python that are imported late.
SHADOWS = """
    alembic click filelock huggingface_hub jinja2 lazy_loader matplotlib msgspec numpy optuna packaging peft ray rich
    safetensors sklearn sqlalchemy timm tomli tomli_w torch torch_optimizer transformers
    csv json logging multiprocessing pickle queue random secrets signal socket sqlite3 tempfile threading uuid
"""
MARKING = 'open(__file__ + ".was_run", "w").close()\n'
LAW = """
from rankaware_optim.laws import Constant, register_law

class Mine(Constant):
    name = "mine"

register_law(Mine())
"""
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
    "suggest . --optimizer mine_optimizer:AdamW",
    f"calibrate loop:train {SHORT}",
    f"calibrate loop:train {SHORT} --workers 2",
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Return a folder with an adapter, a recipe, a sweep, the user's modules, and a module for every name in `SHADOWS`."""
    folder = tmp_path_factory.mktemp("foreign")
    RECIPE.save(folder / "digits.toml")
    peft_folder(folder)
    (folder / "sweep.csv").write_text(SWEEP)
    users = {"mine_law": LAW, "mine_optimizer": OPTIMIZER, "loop": LOOP, "late": ""}
    for name, text in users.items():
        (folder / f"{name}.py").write_text(text)
    for name in SHADOWS.split():
        (folder / f"{name}.py").write_text(MARKING)
    return folder


def run(words: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))},
        capture_output=True,
        text=True,
    )


def marks(folder: Path) -> list[str]:
    """Return the modules of `folder` that were run since the last call and have the name of an installed module."""
    found = sorted(folder.glob("*.py.was_run"))
    for mark in found:
        mark.unlink()
    names = [mark.name.partition(".")[0] for mark in found]
    return [name for name in names if find_spec(name) is not None]


# A script that runs several commands. Like the installed script, it has its own folder first in sys.path.
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


def test_commands_run_nothing_but_what_they_are_given(foreign, tmp_path):
    """No command runs a file that only has the name of an imported module, but a module named in an argument is found."""
    helps = ["--help", *(f"{name} --help" for name in main.commands)]
    commands = [*helps, *PLAIN, *NAMING]
    assert {line.split()[0] for line in [*PLAIN, *NAMING]} == {
        *main.commands,
        "--version",
    }
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    in_turn = [name for name in commands if not name.startswith("calibrate loop")]
    done = run([sys.executable, script, *in_turn], foreign)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RAN ")]
    assert len(lines) == len(in_turn), done.stderr
    for line in lines:
        command, code, ran = json.loads(line.removeprefix("RAN "))
        assert code == 0 or command.startswith("plot"), command
        assert not ran or command in NAMING, command
    assert marks(foreign) == []


@pytest.mark.parametrize("command", ["show digits.toml", *NAMING[-2:]])
def test_the_installed_script_runs_nothing_else_either(command, foreign):
    """The installed script also runs no file of the folder, except the training loop and the modules that it imports."""
    script = shutil.which("rankaware", path=str(Path(sys.executable).parent))
    done = run([script, *command.split()], foreign)
    for made in foreign.glob("r.*"):
        made.unlink()
    assert (done.returncode, marks(foreign)) == (0, []), done.stderr
