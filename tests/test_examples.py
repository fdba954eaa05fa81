"""Tests that the examples in README, SKILL.md and the docstrings run with the installed package."""

from __future__ import annotations

import doctest
import pkgutil
import re
import textwrap
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import rankaware_optim
from rankaware_optim.cli import main

from .helpers.examples import README, readme_blocks

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(rankaware_optim.__path__, "rankaware_optim.")
    if not m.name.endswith("__main__")
)


class Adapted(nn.Module):
    """A frozen linear layer with LoRA matrices, which README's examples call `model`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, 16) / 4)
        self.lora_B = nn.Parameter(torch.zeros(16, rank))
        self.r, self.scaling = rank, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight + self.scaling * self.lora_B @ self.lora_A).T


def build(rank: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Adapted(rank)


def batches(seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(8, 16, generator=generator)
        yield x, x.argmax(dim=1)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    """Every example in a docstring prints the output that the docstring shows."""
    assert doctest.testmod(import_module(name)).failed == 0


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's examples of a custom loop and of a suggestion run. The examples with trainers are run in `integrations`."""
    own_loop, _, no_run, _ = readme_blocks()
    monkeypatch.chdir(tmp_path)
    names = {"F": F, "build": build, "batches": batches, "model": build(32)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(own_loop + no_run, str(README), "exec"), names)
    assert {w.category for w in caught} <= {rankaware_optim.RankAwareWarning}


def test_readmes_shell_command_prints_what_it_shows() -> None:
    """The output below `$ rankaware ...` in README is the first lines that this command prints."""
    text = README.read_text(encoding="utf-8")
    shown = re.search(r"    \$ rankaware (.+)\n((?:    .+\n)+)", text)
    assert shown is not None
    printed = CliRunner().invoke(main, shown[1].split()).output.splitlines()
    lines = textwrap.dedent(shown[2]).splitlines()
    assert printed[: len(lines)] == lines


@pytest.mark.parametrize("command", ["convert", "suggest", "calibrate"])
def test_the_agents_page_has_commands_that_run(command: str) -> None:
    """The three commands that SKILL.md shows have arguments that the command line accepts."""
    text = (README.parent / "SKILL.md").read_text(encoding="utf-8")
    [shown] = re.findall(rf"^rankaware {command} ([^#\n]+)", text, re.M)
    parent = main.context_class(main, **main.context_settings)
    parsed = main.commands[command].make_context(command, shown.split(), parent)
    assert parsed.params


def test_readme_holds_the_two_commands() -> None:
    """The first two lines of README with `tox run` contain nothing but the commands that a newcomer copies."""
    lines = [
        line.strip()
        for line in README.read_text(encoding="utf-8").splitlines()
        if "tox run" in line
    ]
    start = "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox run"
    assert lines[:2] == [f"{start} -e demo", start]
