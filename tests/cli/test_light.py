"""Tests that help, and commands that only read or convert learning rates, do not import torch, which takes seconds."""

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
    """Return a folder with a recipe, a sweep and a PEFT adapter."""
    made = tmp_path_factory.mktemp("light")
    RECIPE.save(made / "digits.toml")
    runs = "".join(f"4,4,{2.0**x},{x * x}\n" for x in (-3, -2, -1, 1))
    (made / "sweep.csv").write_text("rank,alpha,lr,loss\n" + runs)
    peft_folder(made / "adapter")
    return made


def held_after(commands, folder, heavy=("torch", "optuna")) -> list[str]:
    """Return a line for each command, followed by the heavy packages that the process has imported by then."""
    command = [sys.executable, "-c", PROBE, json.dumps(commands), json.dumps(heavy)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith("HELD")]


def test_the_commands_need_no_torch(folder):
    """The light commands run in a fresh process without importing torch or Optuna."""
    assert held_after(LIGHT, folder) == [
        " ".join(["HELD", *arguments]) for arguments in LIGHT
    ]


def test_the_check_can_fail(folder):
    """The check notices that `rankaware fit` imports torch."""
    [line] = held_after([["fit", "sweep.csv"]], folder)
    assert "torch" in line.split()


def test_help_needs_no_numpy_either(tmp_path):
    """The help of the program and of each command imports neither torch nor Optuna nor NumPy."""
    helps = [["--help"], *([name, "--help"] for name in main.commands)]
    assert held_after(helps, tmp_path, ("torch", "optuna", "numpy")) == [
        " ".join(["HELD", *arguments]) for arguments in helps
    ]
