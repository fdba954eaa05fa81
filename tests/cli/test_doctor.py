"""`rankaware doctor`, and completion in a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from click.testing import CliRunner
from packaging.requirements import Requirement

from rankaware_optim.cli import main
from rankaware_optim.cli._doctor import Need, needs_of

PROBE = "import sys\nfrom rankaware_optim.cli import main\nmain(prog_name='rankaware')"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def test_doctor_says_what_is_installed():
    """Python, the packages with their versions, and torch's devices, in the document and in sentences alike."""
    said, found = (
        CliRunner().invoke(main, ["doctor", *words]).stdout
        for words in ([], ["--json"])
    )
    found = json.loads(found)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "optuna", "numpy", "rankaware-optim"):
        assert found["packages"][name] == installed(name)
        assert f"{name} {installed(name)}" in said
    assert found["torch"]["cuda"] == torch.version.cuda
    assert len(found["torch"]["devices"]) >= torch.cuda.device_count()
    assert found["cpus"] >= 1
    assert all(line.endswith((".", "]")) for line in said.splitlines())


def test_doctor_says_how_an_extra_is_completed():
    """An extra is complete where nothing lacks, else it names what lacks and the line that installs it."""
    said, found = (
        CliRunner().invoke(main, ["doctor", *words]).stdout
        for words in ([], ["--json"])
    )
    for extra, lacking in json.loads(found)["extras"].items():
        cure = f'pip install ".[{extra}]"' if lacking else f"Extra {extra} is complete"
        assert cure in said
        assert all(words in said for words in lacking)


NEEDS = [
    ("numpy>=1.24", None, False, "numpy>=1.24 (not installed)"),
    ("numpy>=1.24", "1.20", False, "numpy>=1.24 (1.20 is installed)"),
    ("torch>=2.6", "2.13.0+cpu", True, "torch>=2.6 (2.13.0+cpu is installed)"),
    ("x", "0.0.dev1", True, "x (0.0.dev1 is installed)"),
]


@pytest.mark.parametrize(("text", "found", "met", "words"), NEEDS)
def test_a_need_is_met_by_a_version(text, found, met, words):
    """What is absent or too old is not met, and says so."""
    need = Need(Requirement(text), "", found)
    assert (need.met, need.lacking) == (met, words)


def test_requirements_know_their_extra():
    """A requirement of an extra belongs to it, any other is always needed, one for another system is left out."""
    texts = [
        "numpy>=1",
        "matplotlib>=3; extra == 'plots'",
        "odd>=1; sys_platform == 'none'",
    ]
    assert [(need.requirement.name, need.extra) for need in needs_of(texts)] == [
        ("numpy", ""),
        ("matplotlib", "plots"),
    ]


COMPLETED = [
    ("rankaware d", 1, {"diff", "doctor"}),
    ("rankaware lr --r", 2, {"--rank", "--rslora"}),
    ("rankaware lr r.toml --init ", 4, {"A", "B"}),
]


@pytest.mark.parametrize(("words", "at", "expected"), COMPLETED)
def test_a_shell_completes_commands_options_and_choices(words, at, expected):
    """What the shell's function asks for is answered, in a process of its own as a shell does it."""
    asked = {
        "_RANKAWARE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(at),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | asked,
        capture_output=True,
        text=True,
    )
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_help_says_how_to_turn_completion_on(shell):
    """The line for each shell stands in the main help, and click answers its variable with a script."""
    assert (
        f"_RANKAWARE_COMPLETE={shell}_source rankaware"
        in CliRunner().invoke(main, ["--help"]).output
    )
    if shell == "bash":  # click asks bash for its version
        return
    asked = {"_RANKAWARE_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | asked,
        capture_output=True,
        text=True,
    )
    assert "_RANKAWARE_COMPLETE" in done.stdout
