"""Help, and commands that read, move or draw a rate, start without torch, which takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rankaware_optim.cli import main

from ..helpers.adapters import peft_folder
from ..helpers.recipes import RECIPE

PROBE = """
import json, sys
from rankaware_optim.cli import main
heavy = json.loads(sys.argv[2])
for arguments in json.loads(sys.argv[1]):
    main(arguments, prog_name="rankaware", standalone_mode=False)
    print("HELD", *arguments, *(name for name in heavy if name in sys.modules))
"""
LIGHT = [
    ["lr", "digits.toml", "--rank", "8"],
    ["lr", "digits.toml", "--full"],
    ["show", "digits.toml"],
    ["report", "digits.toml", "-o", "page.html"],
    ["convert", "2e-4", "--from", "r=16,alpha=32", "--to", "r=64"],
    ["convert", "2e-4", "--from", "adapter", "--to", "r=64,alpha=16"],
    ["convert", "2e-4", "--from", "r=16,alpha=32", "--to", "r=64", "--as", "trl"],
    ["inspect", "adapter"],
    ["suggest", "--rank", "16", "--alpha", "32"],
    ["suggest", "adapter"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a recipe and PEFT's files of an adapter."""
    made = tmp_path_factory.mktemp("light")
    RECIPE.save(made / "digits.toml")
    runs = "".join(f"4,4,{2.0**x},{x * x}\n" for x in (-3, -2, -1, 1))
    (made / "sweep.csv").write_text("rank,alpha,lr,loss\n" + runs)
    peft_folder(made / "adapter")
    return made


def held_after(commands, folder, heavy=("torch", "optuna")) -> list[str]:
    """A line for each command, which ends with the heavy packages that the process then holds."""
    command = [sys.executable, "-c", PROBE, json.dumps(commands), json.dumps(heavy)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith("HELD")]


def test_the_commands_need_no_torch(folder):
    """In a fresh process all of them end without torch or Optuna imported."""
    assert held_after(LIGHT, folder) == [
        " ".join(["HELD", *arguments]) for arguments in LIGHT
    ]


def test_the_check_can_fail(folder):
    """The same check sees the torch of a command that fits."""
    [line] = held_after([["fit", "sweep.csv"]], folder)
    assert "torch" in line.split()


def test_help_needs_no_numpy_either(tmp_path):
    """The help of the program and of each command imports none of torch, Optuna and numpy, in one process."""
    helps = [["--help"], *([name, "--help"] for name in main.commands)]
    assert held_after(helps, tmp_path, ("torch", "optuna", "numpy")) == [
        " ".join(["HELD", *arguments]) for arguments in helps
    ]
